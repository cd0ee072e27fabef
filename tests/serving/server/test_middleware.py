"""What stands before every handler: keys, limits, ids, errors, logs and the count of it all."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.testclient import TestClient

from serving.engine.api import GenerationRequest, Handle, Listener, RequestRecord
from serving.entrypoints.http_app import build_app
from serving.entrypoints.logging_setup import JsonFormatter, TextFormatter
from serving.errors import InputError
from serving.protocols.openai import routes
from serving.server.auth import Keys, RateLimiter, read_keys
from serving.server.errors import RateLimitError, UnauthenticatedError
from serving.server.metrics import WARM_UP, EngineMetrics
from serving.server.registry import State
from serving.server.settings import Settings
from tests.closed_form import byte_tokenizer, greedy
from tests.serving.double_engine import DoubleEngine, registry_of
from tests.serving.live_server import running

BODY = {"prompt": "A", "temperature": 0, "max_tokens": 4}


@pytest.fixture
def engine() -> Iterator[DoubleEngine]:
    engine = DoubleEngine(slots=2, queue=2)
    yield engine
    engine.close()


def app_of(engine: DoubleEngine, folder: Path, **settings: object) -> Starlette:
    return build_app(registry_of(engine, folder / "tiny"), Settings(**settings))  # type: ignore[arg-type]


def test_a_key_is_asked_for_everywhere_but_at_health_and_metrics(engine: DoubleEngine, tmp_path: Path) -> None:
    with TestClient(app_of(engine, tmp_path, api_keys=("first-key", "second-key"))) as client:
        assert client.post("/v1/completions", json=BODY).status_code == 401
        answer = client.get("/v1/models", headers={"Authorization": "Bearer wrong-key"})
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"
        for key in ("first-key", "second-key"):
            assert client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
        for path in ("/health/live", "/health/ready", "/metrics"):
            assert client.get(path).status_code == 200
        assert client.get("/nothing").status_code == 401


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nkey-number-1  # for the team\n\nkey-number-2\n")
    assert read_keys(file, "key-number-3, key-number-1,") == ("key-number-1", "key-number-2", "key-number-3")
    assert read_keys(None, "key-number-3", ["key-number-4"]) == ("key-number-3", "key-number-4")
    assert read_keys(None, None) == ()
    file.write_text("# none\n")
    with pytest.raises(InputError, match="no key"):
        read_keys(file, None)
    for key, words in (
        ("short", "8 or more"),
        ("schlüssel-1", "ASCII"),
        ("a\x1bkey-of-1", "print"),
        ("two words", "spaces"),
    ):
        file.write_text(f"long-enough\n{key}\n")
        with pytest.raises(InputError, match=f"^API key 2 .*{words}") as caught:
            read_keys(file, None)
        assert key not in str(caught.value), "the key itself is not shown"
    with pytest.raises(InputError, match="cannot be read"):
        read_keys(tmp_path / "none", None)


def test_keys_are_compared_whole() -> None:
    keys = Keys(["abcdefgh"])
    assert keys.check("Bearer abcdefgh") == keys.check("bearer  abcdefgh")
    for wrong in (None, "", "abcdefgh", "Basic abcdefgh", "Bearer abcdefg", "Bearer abcdefghi", "Bearer "):
        with pytest.raises(UnauthenticatedError):
            keys.check(wrong)


def test_a_rate_limit_refills_evenly_and_for_each_caller() -> None:
    now = [0.0]
    limiter = RateLimiter(2, clock=lambda: now[0])
    for caller in ("a", "b"):
        limiter.take(caller)
        limiter.take(caller)
    with pytest.raises(RateLimitError) as caught:
        limiter.take("a")
    assert caught.value.retry_after == 30
    now[0] = 29.9
    with pytest.raises(RateLimitError):
        limiter.take("a")
    now[0] = 30.1
    limiter.take("a")
    now[0] = 10_000
    limiter.take("a")
    limiter.take("a")
    with pytest.raises(RateLimitError):
        limiter.take("a")


def test_over_the_rate_limit_is_a_429_that_says_when(engine: DoubleEngine, tmp_path: Path) -> None:
    with TestClient(app_of(engine, tmp_path, rate_limit=1)) as client:
        assert client.post("/v1/completions", json=BODY).status_code == 200
        answer = client.post("/v1/completions", json=BODY)
        assert answer.status_code == 429 and 1 <= int(answer.headers["retry-after"]) <= 60
        assert client.get("/health/ready").status_code == 200


def test_without_keys_each_address_has_a_rate_limit_of_its_own(engine: DoubleEngine, tmp_path: Path) -> None:
    app = app_of(engine, tmp_path, rate_limit=1)
    callers = [("10.0.0.1", 5001), ("10.0.0.1", 5002), ("10.0.0.2", 5001)]
    statuses = [TestClient(app, client=caller).get("/v1/models").status_code for caller in callers]
    assert statuses == [200, 429, 200]


def test_each_key_has_a_rate_limit_of_its_own(engine: DoubleEngine, tmp_path: Path) -> None:
    keys = ("first-key", "second-key")
    with TestClient(app_of(engine, tmp_path, rate_limit=2, api_keys=keys)) as client:

        def ask(key: str) -> int:
            return client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code

        assert [ask(keys[0]) for _ in range(3)] == [200, 200, 429]
        assert [ask("wrong-key-1") for _ in range(4)] == [401] * 4, "who is not let in has no limit to use up"
        assert [ask(keys[1]) for _ in range(3)] == [200, 200, 429]


def test_a_body_over_the_limit_is_a_413_declared_or_not(engine: DoubleEngine, tmp_path: Path) -> None:
    with TestClient(app_of(engine, tmp_path, max_body_bytes=1000)) as client:
        long = json.dumps({"prompt": "A" * 1000}).encode()
        headers = {"Content-Type": "application/json"}
        assert client.post("/v1/completions", content=long, headers=headers).status_code == 413
        assert (
            client.post("/v1/completions", content=iter([long[:500], long[500:]]), headers=headers).status_code == 413
        )
        for size, status in ((1000, 200), (1001, 413)):
            body = json.dumps(BODY).encode().ljust(size)
            assert client.post("/v1/completions", content=body, headers=headers).status_code == status
            halves = iter([body[:500], body[500:]])
            assert client.post("/v1/completions", content=halves, headers=headers).status_code == status


def test_a_slow_body_is_a_408_and_holds_nothing(engine: DoubleEngine, tmp_path: Path) -> None:
    with running(app_of(engine, tmp_path, body_timeout=0.1)) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
            connection.sendall(b"Content-Length: 50\r\n\r\n{")
            assert connection.recv(100).startswith(b"HTTP/1.1 408")
        engine.pace = 0.02
        body = {**BODY, "max_tokens": 10, "ignore_eos": True, "stream": True}
        answer = httpx.post(f"{url}/v1/completions", json=body)
        assert answer.text.endswith("data: [DONE]\n\n"), "a slow answer is no slow body"


def test_a_long_prompt_is_refused(engine: DoubleEngine, tmp_path: Path) -> None:
    with TestClient(app_of(engine, tmp_path, max_prompt_tokens=3)) as client:
        assert client.post("/v1/completions", json={**BODY, "prompt": "abc"}).status_code == 200
        answer = client.post("/v1/completions", json={**BODY, "prompt": "abcd"})
        assert answer.status_code == 400 and "at most 3" in answer.json()["error"]["message"]


def test_request_ids_are_taken_or_made(engine: DoubleEngine, tmp_path: Path) -> None:
    with TestClient(app_of(engine, tmp_path)) as client:
        answer = client.post("/v1/completions", json=BODY, headers={"X-Request-Id": "mine.1"})
        assert answer.headers["x-request-id"] == "mine.1" and answer.json()["id"] == "cmpl-mine.1"
        made = [
            client.get("/health/live", headers={"X-Request-Id": bad}).headers["x-request-id"] for bad in ("", "a b")
        ]
        assert len(set(made)) == 2 and all(len(one) == 32 for one in made)


def test_cors_is_off_unless_an_origin_is_named(engine: DoubleEngine, tmp_path: Path) -> None:
    ask = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    with TestClient(app_of(engine, tmp_path)) as client:
        assert client.options("/v1/completions", headers=ask).status_code == 405
        assert "access-control-allow-origin" not in client.get("/v1/models", headers=ask).headers
    settings = {"cors_origins": ("https://page.example",), "api_keys": ("some-key-1",)}
    with TestClient(app_of(engine, tmp_path, **settings)) as client:
        assert client.options("/v1/completions", headers=ask).status_code == 200
        refused = client.get("/v1/models", headers=ask)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://page.example"
        other = client.get("/v1/models", headers={"Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


def test_what_reading_and_building_take_counts_in_the_requests_time(
    engine: DoubleEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, limits = engine.submit, []

    def slow(request: GenerationRequest, listener: Listener) -> Handle:
        limits.append(request.timeout)
        time.sleep(0.2)
        return submit(request, listener)

    monkeypatch.setattr(engine, "submit", slow)
    monkeypatch.setattr(routes, "read_prompts", _after(0.3, routes.read_prompts))
    with TestClient(app_of(engine, tmp_path, request_timeout=10.0)) as client:
        assert client.post("/v1/completions", json={**BODY, "prompt": ["a", "b", "c"]}).status_code == 200
    assert limits[0] < 9.71 and limits[1] < limits[0] - 0.19 and limits[2] < limits[1] - 0.19


def _after(seconds: float, work: Callable[..., Awaitable[object]]) -> Callable[..., Awaitable[object]]:
    async def later(*arguments: object, **named: object) -> object:
        time.sleep(seconds)
        return await work(*arguments, **named)

    return later


def test_a_call_of_many_prompts_waits_as_one_where_nobody_else_does(engine: DoubleEngine, tmp_path: Path) -> None:
    prompts = [prompt for number in range(200) if 256 not in greedy(prompt := [65, number], 2, 257)][:150]
    body = {"prompt": prompts, "max_tokens": 2, "temperature": 0}
    with (
        running(app_of(engine, tmp_path, max_prompts=150)) as url,
        httpx.Client(base_url=url, timeout=60) as client,
        ThreadPoolExecutor() as pool,
    ):
        engine.paused.set()
        whole = pool.submit(client.post, "/v1/completions", json=body)
        while engine.stats().waiting_requests < 100:
            time.sleep(0.01)
        # Longer than the queue of 2: whoever comes now is refused, a call of many prompts as well as one of one.
        refused = [client.post("/v1/completions", json={**body, "prompt": prompt}) for prompt in ("a", ["a"] * 9)]
        engine.paused.clear()
        answer = whole.result(60)
    assert [each.status_code for each in refused] == [429, 429]
    texts = [choice["text"] for choice in answer.json()["choices"]]
    assert texts == [byte_tokenizer().decode(greedy(prompt, 2, 257)) for prompt in prompts]
    too_many = {**body, "prompt": ["a"] * 151}
    with TestClient(app_of(engine, tmp_path, max_prompts=150)) as client:
        assert "at most 150" in client.post("/v1/completions", json=too_many).json()["error"]["message"]
        many = client.post("/v1/completions", json={**body, "n": 100}).json()["error"]
    assert "over 4096 choices" in many["message"] and many["param"] == "n"


def test_a_full_queue_is_a_429_and_what_was_accepted_is_answered(engine: DoubleEngine, tmp_path: Path) -> None:
    engine.paused.set()
    with TestClient(app_of(engine, tmp_path)) as client:
        answers = []
        threads = [
            threading.Thread(target=lambda: answers.append(client.post("/v1/completions", json=BODY).status_code))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        wait_for(lambda: engine.stats().waiting_requests == 2)
        answer = client.post("/v1/completions", json={**BODY, "stream": True})
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["code"] == "queue_full"
        both = client.post("/v1/completions", json={**BODY, "prompt": ["a", "b"]})
        assert both.status_code == 429 and engine.stats().waiting_requests == 2
        engine.paused.clear()
        for thread in threads:
            thread.join(10)
        assert answers == [200, 200]


def test_a_deadline_is_a_504_or_an_event_of_the_stream(engine: DoubleEngine, tmp_path: Path) -> None:
    engine.pace = 0.02
    body = {"prompt": [1], "max_tokens": 1000, "ignore_eos": True}
    with TestClient(app_of(engine, tmp_path)) as client:
        headers = {"X-Request-Timeout": "0.1"}
        answer = client.post("/v1/completions", json=body, headers=headers)
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
        answer = client.post("/v1/completions", json={**body, "stream": True}, headers=headers)
        events = [event.removeprefix("data: ") for event in answer.text.split("\n\n")]
        assert answer.status_code == 200 and len(events) > 3 and events[-2] == "[DONE]"
        assert json.loads(events[-3])["error"]["code"] == "timeout"
        assert engine.stats().active_slots == 0


def test_readiness_follows_the_models_and_the_drain(engine: DoubleEngine, tmp_path: Path) -> None:
    app = app_of(engine, tmp_path)
    server = app.state.server
    model = server.registry.get("tiny")
    with TestClient(app) as client:
        assert client.get("/health/ready").status_code == 200
        model.state = State.LOADING
        assert client.get("/health/ready").json()["reason"] == "the model 'tiny' is not ready yet"
        answer = client.post("/v1/completions", json=BODY)
        assert answer.status_code == 503 and "retry-after" in answer.headers
        model.state, server.draining = State.AVAILABLE, True
        assert client.get("/health/ready").status_code == 503 and client.get("/health/live").status_code == 200
        answer = client.post("/v1/completions", json=BODY)
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["code"] == "draining"


def test_metrics_count_requests_tokens_and_errors(tmp_path: Path) -> None:
    app = build_app(registry_of(engine := DoubleEngine(), tmp_path / "tiny"), Settings())
    metrics = app.state.server.metrics.model("tiny", 1)
    engine.observer, metrics.engine = metrics, engine
    with TestClient(app) as client:
        for _ in range(3):
            client.post("/v1/completions", json=BODY)
        client.post("/v1/completions", json={"prompt": 7})
        client.get("/no/such/path")
        wait_for(lambda: engine.stats().active_slots == 0)
        families = {family.name: family for family in text_string_to_metric_families(client.get("/metrics").text)}
    samples = [sample for family in families.values() for sample in family.samples]

    def value(name: str, **labels: str) -> float:
        wanted = {"model_name": "tiny", "version": "1"} if not name.startswith("http") else {}
        (found,) = [one for one in samples if one.name == "gpt2_bundle_" + name and one.labels == wanted | labels]
        return float(found.value)

    assert value("request_success_total", finished_reason="length") == 3
    assert value("generation_tokens_total") == 12
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert value(name + "_count") == value(name + "_bucket", le="+Inf") == 3
    for name in ("request_prefill_time_seconds", "request_decode_time_seconds", "request_inference_time_seconds"):
        assert value(name + "_count") == value(name + "_bucket", le="+Inf") == 3
    assert value("request_generation_tokens_bucket", le="2.0") == 0
    assert value("request_generation_tokens_bucket", le="4.0") == 3
    assert value("inter_token_latency_seconds_bucket", le="0.001") == value("inter_token_latency_seconds_count") > 0
    assert value("num_requests_running") == 0 and value("slots") == 4
    assert value("http_requests_total", method="POST", path="/v1/completions", status="200") == 3
    assert value("http_requests_total", method="POST", path="/v1/completions", status="400") == 1
    assert value("http_requests_total", method="GET", path="unmatched", status="404") == 1
    metrics.release()
    engine.close()
    assert metrics.stats() is not None and metrics.stats().generated_tokens == 12


def test_a_requests_times_are_counted_as_far_as_it_came() -> None:
    metrics = EngineMetrics()
    metrics.on_finish(RequestRecord("never ran", "timeout", 3, 0, 0, 10.0, None, None, 12.5))
    metrics.on_finish(RequestRecord("ran", "length", 5, 2, 7, 10.0, 11.0, 11.5, 14.0))
    metrics.on_finish(RequestRecord(WARM_UP, "length", 5, 2, 7, 10.0, 11.0, 11.5, 14.0))
    found = {name: (each.sum, sum(each.counts)) for name, each in metrics.histograms.items() if sum(each.counts)}
    assert found == {
        "time_to_first_token_seconds": (1.5, 1),
        "request_queue_time_seconds": (1.0, 1),
        "e2e_request_latency_seconds": (6.5, 2),
        "request_prefill_time_seconds": (0.5, 1),
        "request_decode_time_seconds": (2.5, 1),
        "request_inference_time_seconds": (3.0, 1),
        "request_prompt_tokens": (8, 2),
        "request_generation_tokens": (7, 2),
    }
    assert metrics.outcomes == {"timeout": 1, "length": 1} and metrics.seconds == {"timeout": 2.5, "length": 4.0}


def test_logs_are_one_line_of_json_or_text_each() -> None:
    record = logging.makeLogRecord({"name": "gpt2_bundle.access", "levelname": "INFO", "msg": "a\n%d", "args": (1,)})
    record.request_id = "r1"
    line = JsonFormatter().format(record)
    assert "\n" not in line and json.loads(line)["request_id"] == "r1" and json.loads(line)["message"] == "a\n1"
    assert TextFormatter().format(record).endswith("a\\n1 request_id=r1")


def test_a_line_of_text_gives_the_terminal_no_orders() -> None:
    record = logging.makeLogRecord({"levelname": "INFO", "msg": "GET /\x1b]0;a\x07\u009b2J", "folder": "b\x1b[2J"})
    assert TextFormatter().format(record).endswith("GET /\\x1b]0;a\\x07\\x9b2J folder=b\\x1b[2J")


def test_the_access_log_has_the_request(engine: DoubleEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "gpt2_bundle.access"), TestClient(app_of(engine, tmp_path)) as client:
        client.post("/v1/completions", json=BODY, headers={"X-Request-Id": "r2"})
        client.get("/health/live")
    (record,) = [record for record in caplog.records if record.name == "gpt2_bundle.access"]
    assert record.__dict__["client"] == "testclient"
    assert record.__dict__["request_id"] == "r2" and record.__dict__["status"] == 200
    assert record.__dict__["completion_tokens"] == 4 and record.__dict__["model"] == "tiny"


def wait_for(holds: object, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.002)
