"""The way of a request through the ingress: answers as the server gives them, lost replicas, and clients that leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.testclient import TestClient
from starlette.types import Message

from serving.entrypoints.http_app import build_app, gated_app
from serving.ray.forwarding import ATTEMPTS, ForwardedRequest, Forwarder, answer
from serving.server.errors import ReplicaLostError
from serving.server.event_stream import EventStream
from serving.server.registry import ModelRegistry
from serving.server.settings import Settings
from serving.server.state import Server

Call = Callable[[ForwardedRequest], AsyncGenerator[list[Message], None]]


def ingress(call: Call, timeout: float | None = 5.0, **settings: Any) -> TestClient:
    server = Server(ModelRegistry(), Settings(**settings))
    return TestClient(gated_app([Mount("/", Forwarder(call, timeout, 256))], server), raise_server_exceptions=False)


def through(app: Starlette, lose: Callable[[int, int], bool] = lambda attempt, batch: False) -> tuple[Call, list[Any]]:
    """A call that has `app` answer and loses the replica where `lose` says so, and the requests that came."""
    requests: list[ForwardedRequest] = []

    async def call(request: ForwardedRequest) -> AsyncGenerator[list[Message], None]:
        requests.append(request)
        attempt, batches = len(requests), 0
        if lose(attempt, 0):
            raise ReplicaLostError("the replica that answered is gone; send the request again")
        async for batch in answer(app, request):
            yield batch
            batches += 1
            if lose(attempt, batches):
                raise ReplicaLostError("the replica that answered is gone; send the request again")

    return call, requests


async def _echo(request: Request) -> Response:
    body = await request.body()
    return JSONResponse(
        {
            "body": body.decode(),
            "path": request.url.path,
            "query": request.url.query,
            "header": request.headers.get("x-mine"),
            "id": request.headers["x-request-id"],
        },
        headers={"X-Other": "1"},
    )


async def _stream(request: Request) -> Response:
    async def chunks() -> AsyncGenerator[bytes, None]:
        for index in range(5):
            yield b"data: %d\n\n" % index
            await asyncio.sleep(0.002)

    return EventStream(chunks())


APP = Starlette(
    routes=[
        Route("/v1/echo", _echo, methods=["GET", "POST"]),
        Route("/v1/stream", _stream, methods=["POST"]),
        Route("/v2/models/m/generate_stream", _stream, methods=["POST"]),
    ]
)


def test_a_request_arrives_whole_and_its_answer_comes_back() -> None:
    call, requests = through(APP)
    answered = ingress(call).post(
        "/v1/echo?a=%20b", content=b'{"prompt": "abc"}', headers={"X-Mine": "2", "X-Request-Id": "mine"}
    )
    assert answered.status_code == 200 and answered.headers["x-other"] == "1"
    assert answered.json() == {
        "body": '{"prompt": "abc"}', "path": "/v1/echo", "query": "a=%20b", "header": "2", "id": "mine",
    }  # fmt: skip
    assert answered.headers.get_list("x-request-id") == ["mine"]
    assert requests[0].prefix_key is not None


def test_a_stream_leaves_event_by_event() -> None:
    seen: list[int] = []

    async def run() -> None:
        async for batch in answer(APP, forwarded("/v1/stream")):
            seen.append(sum(len(each.get("body", b"")) > 0 for each in batch))

    asyncio.run(run())
    assert sum(seen) == 5 and len(seen) > 2
    call, _ = through(APP)
    assert ingress(call).post("/v1/stream").text == "".join(f"data: {index}\n\n" for index in range(5))


def test_an_interval_joins_the_parts_of_a_stream() -> None:
    async def run(interval: float) -> tuple[int, bytes]:
        batches = [batch async for batch in answer(APP, forwarded("/v1/stream"), interval)]
        return len(batches), b"".join(each.get("body", b"") for batch in batches for each in batch)

    many, whole = asyncio.run(run(0.0))
    few, joined = asyncio.run(run(0.05))
    assert joined == whole and few <= 3 < many


def forwarded(path: str, body: bytes = b"") -> ForwardedRequest:
    return ForwardedRequest("POST", path, path.encode(), b"", (), ("127.0.0.1", 1), body)


def test_a_request_whose_answer_has_not_begun_goes_to_another_replica() -> None:
    call, requests = through(APP, lambda attempt, batch: attempt < 3)
    assert ingress(call).post("/v1/stream").text.endswith("data: 4\n\n")
    assert len(requests) == 3


def test_a_whole_answer_that_broke_off_is_asked_for_again() -> None:
    async def half(request: ForwardedRequest) -> AsyncGenerator[list[Message], None]:
        nonlocal asked
        asked += 1
        yield [{"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}]
        yield [{"type": "http.response.body", "body": b'{"a":', "more_body": True}]
        if asked > 1:
            yield [{"type": "http.response.body", "body": b"1}", "more_body": False}]

    asked = 0
    assert ingress(half).post("/v1/echo").json() == {"a": 1}
    assert asked == 2


def test_after_the_last_attempt_a_client_is_told_to_come_back() -> None:
    call, requests = through(APP, lambda attempt, batch: True)
    answered = ingress(call).post("/v1/echo")
    assert answered.status_code == 503 and answered.headers["retry-after"] == "1"
    assert answered.json()["error"]["code"] == "replica_lost" and "again" in answered.json()["error"]["message"]
    assert len(requests) == ATTEMPTS


@pytest.mark.parametrize("path", ["/v1/stream", "/v2/models/m/generate_stream"])
def test_a_stream_that_has_begun_ends_with_an_error_event(path: str) -> None:
    call, requests = through(APP, lambda attempt, batch: batch == 2)
    answered = ingress(call).post(path)
    assert answered.status_code == 200 and len(requests) == 1
    events = [line.removeprefix("data: ") for line in answered.text.strip().split("\n\n")]
    assert events[0] == "0"
    if path.startswith("/v1"):
        assert events[-1] == "[DONE]" and json.loads(events[-2])["error"]["code"] == "replica_lost"
    else:
        assert "again" in json.loads(events[-1])["error"]


def test_a_replica_lost_after_its_answer_loses_nothing() -> None:
    async def call(request: ForwardedRequest) -> AsyncGenerator[list[Message], None]:
        async for batch in answer(APP, request):
            yield batch
        raise ReplicaLostError("the replica that answered is gone; send the request again")

    assert ingress(call).post("/v1/stream").text.endswith("data: 4\n\n")
    assert ingress(call).post("/v1/echo").status_code == 200


def test_a_request_that_no_replica_takes_ends_in_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def waits(request: ForwardedRequest) -> AsyncGenerator[list[Message], None]:
        await asyncio.sleep(30)
        yield []

    monkeypatch.setattr("serving.ray.forwarding._GRACE_SECONDS", 0.05)
    answered = ingress(waits, timeout=0.1).post("/v1/echo")
    assert answered.status_code == 503 and answered.headers["retry-after"] == "1"
    assert answered.json()["error"]["code"] == "model_not_ready"


def test_keys_and_limits_hold_before_a_replica_is_asked() -> None:
    call, requests = through(APP)
    client = ingress(call, api_keys=("secret-key",), max_body_bytes=10)
    assert client.post("/v1/echo").status_code == 401
    key = {"Authorization": "Bearer secret-key"}
    assert client.post("/v1/echo", content=b"x" * 11, headers=key).status_code == 413
    assert not requests
    assert client.post("/v1/echo", content=b"x", headers=key).status_code == 200


def test_closing_the_answer_ends_the_handler() -> None:
    ended = asyncio.Event()

    async def slow(request: Request) -> Response:
        async def chunks() -> AsyncGenerator[bytes, None]:
            try:
                while True:
                    yield b"data: 1\n\n"
                    await asyncio.sleep(0.01)
            finally:
                ended.set()

        return EventStream(chunks())

    async def run() -> None:
        batches = answer(Starlette(routes=[Route("/", slow, methods=["POST"])]), forwarded("/"))
        await anext(batches)
        await batches.aclose()
        assert ended.is_set()

    asyncio.run(run())


def test_a_handler_that_fails_fails_the_call() -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise OSError("broken")

    async def run() -> None:
        async for _ in answer(broken, forwarded("/")):
            raise AssertionError

    with pytest.raises(OSError, match="broken"):
        asyncio.run(run())


def test_the_servers_application_answers_alike_with_and_without_the_ingress(tmp_path: Path) -> None:
    app = build_app(ModelRegistry(), Settings())
    direct, forwarded_client = TestClient(app), ingress(through(app)[0])
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/nothing"), ("GET", "/health")):
        one, other = direct.request(method, path), forwarded_client.request(method, path)
        assert (one.status_code, one.text) == (other.status_code, other.text)
        kept = [{k: v for k, v in each.headers.items() if k != "x-request-id"} for each in (one, other)]
        assert kept[0] == kept[1]
