"""Locust's users, which fail where an answer is not the one in the variable EXPECTED; half of them stream."""

from __future__ import annotations

import json
import os

from locust import HttpUser, constant, task

EXPECTED = os.environ["EXPECTED"]
BODY = {"prompt": "ab cd", "max_tokens": 96, "temperature": 0}


class Whole(HttpUser):
    """Asks for whole completions."""

    wait_time = constant(0)

    @task
    def complete(self) -> None:
        with self.client.post("/v1/completions", json=BODY, name="whole", catch_response=True) as response:
            if response.status_code != 200 or response.json()["choices"][0]["text"] != EXPECTED:
                response.failure(f"{response.status_code} {response.text[:200]}")

    @task
    def overflow(self) -> None:
        body = {**BODY, "max_tokens": 100_000}
        with self.client.post("/v1/completions", json=body, name="overflow", catch_response=True) as response:
            if response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded":
                response.success()
            else:
                response.failure(f"{response.status_code} {response.text[:200]}")


class Streams(HttpUser):
    """Asks for streams."""

    wait_time = constant(0)

    @task
    def stream(self) -> None:
        body = {**BODY, "stream": True}
        with self.client.post(
            "/v1/completions", json=body, name="stream", stream=True, catch_response=True
        ) as response:
            events = [line[6:] for line in response.iter_lines(decode_unicode=True) if line]
            text = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
            if events[-1:] != ["[DONE]"] or text != EXPECTED:
                response.failure(f"{response.status_code} {text!r}")
