"""The Ray Serve application on a real cluster of two nodes on this machine, asked by OpenAI's client and plain HTTP."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from serving.bundle import open_bundle
from serving.engine.engine import open_engine
from tests.ecosystem.ray_driver import PYTHON, SERVE, SLOTS, RayCluster, started
from tests.tiny_build import SENTENCE, TinyBuild, write_corpus

pytestmark = [
    pytest.mark.ecosystem,
    pytest.mark.skipif(not PYTHON, reason="RAY_PYTHON names no Python with ray[serve]; run 'make test-ecosystem'"),
]
LONG = 700
"""Tokens of a stream that lasts about a second."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a context that is long enough for streams of a second; RAY_TEST_BUNDLE names one that is there."""
    if given := os.environ.get("RAY_TEST_BUNDLE"):
        return Path(given)
    from serving.cli import run

    folder = tmp_path_factory.mktemp("ray")
    build = TinyBuild(write_corpus(folder / "corpus.txt"), folder / "runs", folder / "dist")
    size = ("model.n_positions=1024", "model.n_embd=128", "model.n_layer=4", "model.n_head=4")
    assert run(build.build(*size)) == 0
    return build.bundle


@pytest.fixture(scope="module")
def cluster(bundle: Path) -> Iterator[RayCluster]:
    with started(bundle) as made:
        yield made


@pytest.fixture(scope="module")
def running(cluster: RayCluster) -> RayCluster:
    """The cluster with a replica on each of its two nodes."""
    assert cluster.deploy() == ""
    assert len(set(cluster.wait_for(lambda nodes: len(nodes) == 2))) == 2
    return cluster


@pytest.fixture(scope="module")
def plain(bundle: Path) -> Iterator[httpx2.Client]:
    """A client of `gpt2-bundle serve`'s application in this process."""
    from starlette.testclient import TestClient

    from serving.commands.serve import build_server, serve

    asked = serve.make_context("serve", [str(bundle), *SERVE]).params
    app, versions = build_server(asked.pop("bundle"), asked)
    versions.start()
    yield TestClient(app)
    versions.close()


def prompts(count: int, words: int = 60) -> list[str]:
    """Texts that differ from their first word on."""
    parts = SENTENCE.split()
    return [
        " ".join(parts[(index * 7 + at * (index + 3)) % len(parts)] for at in range(words)) for index in range(count)
    ]


REQUESTS = [
    ("/v1/completions", {"prompt": "Return the value", "max_tokens": 32, "temperature": 0}),
    ("/v1/completions", {"prompt": ["Return", [5, 6, 7]], "max_tokens": 8, "temperature": 0.9, "seed": 3, "n": 2}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 4, "logprobs": 2, "temperature": 0}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 0}),
    ("/v1/completions", {"prompt": "a", "model": "other"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}),
    ("/tokenize", {"prompt": "Return the value"}),
    ("/v1/nothing", {}),
]


@pytest.mark.parametrize(("path", "body"), REQUESTS)
def test_answers_are_those_of_the_plain_server(
    running: RayCluster, plain: httpx2.Client, path: str, body: dict[str, Any]
) -> None:
    ours, theirs = httpx2.post(running.url + path, json=body, timeout=60), plain.post(path, json=body)
    assert ours.status_code == theirs.status_code
    ours_body, theirs_body = ours.json(), theirs.json()
    for changing in ("id", "created", "usage"):
        ours_body.pop(changing, None), theirs_body.pop(changing, None)
    assert ours_body == theirs_body
    assert len(ours.headers.get_list("x-request-id")) == 1


def test_a_stream_comes_token_by_token(running: RayCluster, plain: httpx2.Client) -> None:
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
    asked: dict[str, Any] = {
        "prompt": "Return the",
        "max_tokens": LONG,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    times, text = [], ""
    for chunk in client.completions.create(model="tiny", stream=True, **asked):
        times.append(time.monotonic())
        text += chunk.choices[0].text
    body = asked | asked.pop("extra_body")
    assert text == plain.post("/v1/completions", json=body).json()["choices"][0]["text"]
    # A buffered stream would come at once; this one takes as long as its tokens.
    assert len(times) > 20 and times[-1] - times[0] > 0.2


def test_equal_prefixes_go_to_the_replica_that_has_them(running: RayCluster) -> None:
    starts = prompts(12)
    assert all(len(start) > 256 for start in starts)
    cached = []
    # Three at a time, as a replica keeps few prefixes. Random routing would find all with a chance of 1 in 4096.
    for first in range(0, len(starts), SLOTS - 1):
        for turn in range(2):
            for start in starts[first : first + SLOTS - 1]:
                body = {"prompt": f"{start} {turn}", "max_tokens": 1}
                usage = httpx2.post(f"{running.url}/v1/completions", json=body, timeout=60).json()["usage"]
                if turn:
                    cached.append(usage["prompt_tokens_details"]["cached_tokens"] / usage["prompt_tokens"])
    assert len(cached) == 12 and min(cached) > 0.5, cached


def test_a_full_queue_is_a_429(running: RayCluster) -> None:
    limits = {"name": "Replica", "max_ongoing_requests": 1, "max_queued_requests": 1}
    assert running.deploy([limits]) == ""
    running.wait_for(lambda nodes: len(nodes) == 2)
    body = {"prompt": "a", "max_tokens": 200, "temperature": 0, "ignore_eos": True}
    with ThreadPoolExecutor(12) as pool:
        answers = list(
            pool.map(lambda _: httpx2.post(f"{running.url}/v1/completions", json=body, timeout=90), range(12))
        )
    refused = [answer for answer in answers if answer.status_code != 200]
    assert 0 < len(refused) < len(answers)
    for answer in refused:
        assert answer.status_code == 429 and answer.json()["error"]["code"] == "queue_full", answer.text
        assert int(answer.headers["retry-after"]) >= 1
    assert running.deploy() == ""
    running.wait_for(lambda nodes: len(nodes) == 2)


@dataclass
class Outcome:
    """What a client saw: its text, its status, and the error event of a stream that broke off."""

    streamed: bool
    prompt: str
    status: int
    text: str
    error: str = ""
    began: float = 0.0
    ended: float = 0.0


def ask(url: str, prompt: str, streamed: bool) -> Outcome:
    body = {"prompt": prompt, "max_tokens": LONG, "temperature": 0, "ignore_eos": True, "stream": streamed}
    began, text, error = time.monotonic(), "", ""
    with httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=90) as response:
        if not streamed or response.status_code != 200:
            answer = json.loads(response.read())
            text, error = ("", answer["error"]["code"]) if "error" in answer else (answer["choices"][0]["text"], "")
        else:
            ended = False
            for line in response.iter_lines():
                data = line.removeprefix("data: ")
                ended |= data == "[DONE]"
                if line.startswith("data: {"):
                    event = json.loads(data)
                    error = error or event.get("error", {}).get("code", "")
                    text += "" if error else event["choices"][0]["text"]
            assert ended, "a stream ended without its last event"
    return Outcome(streamed, prompt, response.status_code, text, error, began, time.monotonic())


def test_a_killed_node_loses_only_what_it_was_streaming(running: RayCluster, plain: httpx2.Client) -> None:
    texts = prompts(8)
    body = {"max_tokens": LONG, "temperature": 0, "ignore_eos": True}
    expected = {
        prompt: plain.post("/v1/completions", json={"prompt": prompt, **body}).json()["choices"][0]["text"]
        for prompt in texts
    }
    stop = threading.Event()

    def client(index: int) -> list[Outcome]:
        seen = []
        while not stop.is_set():
            seen.append(ask(running.url, texts[index], streamed=index not in (2, 4)))
        return seen

    with ThreadPoolExecutor(len(texts)) as pool:
        clients = [pool.submit(client, index) for index in range(len(texts))]
        time.sleep(4)
        killed = time.monotonic()
        running.order("kill")
        time.sleep(8)
        stop.set()
        outcomes = [outcome for each in clients for outcome in each.result()]

    lost = [each for each in outcomes if each.error]
    for each in outcomes:
        if each.error:
            assert each.streamed and each.error == "replica_lost" and each.began < killed < each.ended, each
            assert expected[each.prompt].startswith(each.text) and each.text, each
        else:
            assert each.status == 200 and each.text == expected[each.prompt], each
    assert 1 <= len(lost) <= SLOTS + 1, [(each.streamed, each.error) for each in outcomes]
    # Whole answers that the lost replica was working on came from the other one.
    assert any(not each.streamed and each.began < killed < each.ended for each in outcomes)
    assert sum(each.began > killed for each in outcomes) > 2

    running.order("add")
    assert len(set(running.wait_for(lambda nodes: len(nodes) == 2))) == 2


def test_replicas_stop_when_idle_and_come_back(running: RayCluster, plain: httpx2.Client) -> None:
    scaling = {
        "min_replicas": 0, "max_replicas": 2, "target_ongoing_requests": SLOTS, "upscale_delay_s": 0,
        "downscale_delay_s": 1, "look_back_period_s": 2, "metrics_interval_s": 1,
    }  # fmt: skip
    assert running.deploy([{"name": "Replica", "autoscaling_config": scaling}], min_replicas=0) == ""
    running.wait_for(lambda nodes: not nodes)
    assert httpx2.get(f"{running.url}/health/ready").status_code == 200
    assert not running.order("replicas")
    # Requests that come while no replica runs wait for one, and all are answered.
    body = {"prompt": "Return the value", "max_tokens": 16, "temperature": 0}
    with ThreadPoolExecutor(6) as pool:
        answers = list(
            pool.map(lambda _: httpx2.post(f"{running.url}/v1/completions", json=body, timeout=90), range(6))
        )
    expected = plain.post("/v1/completions", json=body).json()["choices"]
    assert [answer.json()["choices"] for answer in answers] == [expected] * 6
    assert 1 <= len(running.wait_for(bool)) <= 2
    running.wait_for(lambda nodes: not nodes)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"cpus": 64.0}, ["a replica takes 64 CPU", "no node of the Ray cluster has that", "check_resources"]),
        ({"memory": 1 << 40}, ["1048576 MiB of memory", "no node of the Ray cluster has that"]),
        ({"bundle": "/nowhere/at-all"}, ["/nowhere/at-all", "there is no such folder"]),
    ],
)
def test_what_cannot_run_says_so_in_one_line(cluster: RayCluster, args: dict[str, Any], words: list[str]) -> None:
    problem = cluster.deploy(**args)
    assert any(all(word in line for word in words) for line in problem.splitlines()), problem


def test_the_engine_itself_agrees(running: RayCluster, bundle: Path) -> None:
    """An oracle that shares no protocol code: the engine, asked by token ids."""
    from queue import Queue

    from serving.engine.api import FinishEvent, GenerationRequest, TokenEvent
    from serving.sampling import SamplingParams

    assert running.deploy() == ""
    ids = [40, 41, 42, 43]
    body = {"prompt": ids, "max_tokens": 32, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    answer = httpx2.post(f"{running.url}/v1/completions", json=body, timeout=60).json()
    events: Queue[Any] = Queue()
    engine = open_engine(open_bundle(bundle), "ort/fp32")
    params = SamplingParams(max_new_tokens=32, temperature=0.0, ignore_eos=True)
    engine.submit(GenerationRequest(tuple(ids), params), events.put)
    tokens = []
    while not isinstance(event := events.get(timeout=60), FinishEvent):
        if isinstance(event, TokenEvent):
            tokens.append(event.token_id)
    engine.close()
    assert answer["choices"][0]["token_ids"] == tokens and len(tokens) == 32


def test_a_batch_is_answered_as_the_batch_command_does(bundle: Path, tmp_path: Path) -> None:
    lines = [
        {"custom_id": f"c{index}", "method": "POST", "url": "/v1/completions",
         "body": {"prompt": text, "max_tokens": 8, "temperature": 0}}
        for index, text in enumerate(prompts(40, words=12))
    ]  # fmt: skip
    lines[3]["body"]["max_tokens"] = -1
    requests = tmp_path / "requests.jsonl"
    texts = [json.dumps(line) for line in lines]
    requests.write_text("\n".join([*texts, "no JSON", texts[0]]) + "\n")
    from serving.cli import run

    plain, ours = tmp_path / "plain.jsonl", tmp_path / "ray.jsonl"
    assert run(["batch", str(bundle), str(requests), str(plain)]) == 1
    # A first run that was killed in the middle of an answer.
    ours.write_bytes(b"".join(plain.read_bytes().splitlines(keepends=True)[:5]) + b'{"id": "half')
    command = [
        str(PYTHON),
        "-m",
        "serving.ray.batch",
        str(bundle),
        str(requests),
        str(ours),
        "--actors=2",
        "--cpus=0.5",
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE": "1",
    }
    done = subprocess.run(
        [*command, "--batch-size=4", "--serve=--threads=1"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 1, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"answers": 42, "new": 37, "errors": 3}
    kept = [answers_of(path) for path in (plain, ours)]
    assert kept[0] == kept[1] and len(kept[0]) == 42


def answers_of(path: Path) -> list[str]:
    """What each line was answered, without what differs from run to run."""
    found = []
    for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        response = line["response"] and {"status": line["response"]["status_code"], "body": line["response"]["body"]}
        for changing in ("id", "created", "usage"):
            response and response["body"].pop(changing, None)
        found.append(json.dumps([line["custom_id"], response, line["error"]], sort_keys=True))
    return sorted(found)
