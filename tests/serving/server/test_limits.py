"""What one client may take from the others: bodies, connections, tries at a key, the log, and the form of HTTP."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from serving.entrypoints.http_app import build_app
from serving.entrypoints.http_limits import limited
from serving.entrypoints.logging_setup import JsonFormatter, TextFormatter
from serving.errors import InputError
from serving.server.errors import failure_of
from serving.server.settings import Settings
from tests.serving.attacked import attacked
from tests.serving.double_engine import DoubleEngine, registry_of
from tests.serving.live_server import running
from tests.serving.protocols.open_inference.double_server import all_routes
from tests.serving.server.test_middleware import wait_for


@pytest.fixture
def engine() -> Iterator[DoubleEngine]:
    engine = DoubleEngine(slots=2, queue=2)
    yield engine
    engine.close()


def app_of(engine: DoubleEngine, folder: Path, **settings: Any) -> Any:
    registry, made = registry_of(engine, folder / "tiny"), Settings(**settings)
    return build_app(registry, made, all_routes(registry, made))


def raw(url: str, data: bytes) -> bytes:
    """Whatever the server says to `data` until it closes, or for a second."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 5) as connection:
        connection.sendall(data)
        answer = b""
        connection.settimeout(1)
        with contextlib.suppress(TimeoutError):
            while piece := connection.recv(65536):
                answer += piece
    return answer


def test_an_error_can_always_be_encoded_and_is_short() -> None:
    failure = failure_of(InputError("\ud800 " + "x" * 4_000_000))
    assert len(failure.message) <= 500
    failure.message.encode()


SURROGATE = '"\\ud800"'
LONG = json.dumps("x" * 3_000_000)


@pytest.mark.parametrize("text", [SURROGATE, LONG], ids=["surrogate", "long"])
@pytest.mark.parametrize(
    ("path", "form"),
    [
        ("/v1/models/tiny:predict", '{"signature_name": %s, "instances": [1]}'),
        ("/v1/models/tiny:predict", '{"inputs": {%s: []}}'),
        ("/v1/models/tiny:predict", '{"signature_name": "tokenize", "instances": [{"b64": %s}]}'),
        ("/v2/models/tiny/infer", '{"inputs": [{"name": %s, "shape": [1], "datatype": "BYTES", "data": [1]}]}'),
        ("/v2/models/tiny/infer", '{"inputs": [{"name": "a", "shape": [1], "datatype": %s, "data": [1]}]}'),
        ("/v2/models/tiny/infer", '{"inputs": [], "parameters": {"signature_name": %s}}'),
        ("/v2/models/tiny/infer", '{"id": %s, "inputs": [], "outputs": [{"name": "x"}]}'),
        ("/v2/models/tiny/generate", '{"text_input": "a", "parameters": {"stream": %s}}'),
        ("/v1/completions", '{"model": %s}'),
        ("/v1/completions", '{"prompt": "a", "logit_bias": {%s: 1}}'),
        ("/v1/completions", '{"prompt": "a", "stop": [%s]}'),
        ("/tokenize", '{"model": %s, "prompt": "a"}'),
    ],
)
def test_a_callers_text_is_cut_in_errors(engine: DoubleEngine, tmp_path: Path, path: str, form: str, text: str) -> None:
    client = TestClient(app_of(engine, tmp_path), raise_server_exceptions=False)
    answer = client.post(path, content=form % text, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 404), answer.text[:300]
    assert len(answer.content) < 1000 and answer.json()["error"]


def test_long_names_in_paths_are_cut_and_logged_short(engine: DoubleEngine, tmp_path: Path) -> None:
    client = TestClient(app_of(engine, tmp_path))
    for path in ("/v1/models/", "/v2/models/", "/"):
        answer = client.get(path + "x" * 60_000)
        assert answer.status_code == 404 and len(answer.content) < 500


@pytest.mark.parametrize("form", [TextFormatter(), JsonFormatter()])
def test_the_log_says_why_a_request_was_refused(
    engine: DoubleEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture, form: logging.Formatter
) -> None:
    client = TestClient(app_of(engine, tmp_path))
    with caplog.at_level(logging.INFO, "gpt2_bundle.access"):
        client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2000})
        client.get("/nothing")
    first, second = (form.format(record) for record in caplog.records)
    assert "This model's maximum context length is 1024 tokens" in first
    assert "there is nothing at /nothing" in second


def test_the_text_log_cannot_be_forged(engine: DoubleEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    client = TestClient(app_of(engine, tmp_path), client=("10.0.0.1 status=200 client=evil", 1))
    with caplog.at_level(logging.INFO, "gpt2_bundle.access"):
        client.get("/x%20200%20client=10.9.9.9%0aPOST%20/y%20200")
    line = TextFormatter().format(caplog.records[0])
    assert "client=unknown" in line and "evil" not in line and "\n" not in line
    outside = re.sub(r'"(?:[^"\\]|\\.)*"', "", line)
    assert " client=10.9.9.9" not in outside and " 200" not in outside
    record = logging.makeLogRecord({"msg": "m", "model": 'a b" c=d'})
    assert TextFormatter().format(record).endswith('model="a b\\" c=d"')


def test_wrong_keys_are_limited_and_right_ones_are_not(engine: DoubleEngine, tmp_path: Path) -> None:
    client = TestClient(app_of(engine, tmp_path, api_keys=("right-key-1",), wrong_keys=3))

    def ask(key: str) -> int:
        return client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code

    assert [ask("wrong-key-1") for _ in range(5)] == [401, 401, 401, 429, 429]
    assert ask("right-key-1") == 200


def test_unfinished_bodies_have_a_common_budget(tmp_path: Path) -> None:
    with attacked(tmp_path, max_bodies_bytes=16 << 20) as server:
        before = server.resident()
        head = POST + b"Host: x\r\nContent-Length: 4000000\r\n\r\n"
        held = []
        for _ in range(60):
            connection = server.connect()
            connection.settimeout(0.2)
            held.append(connection)
            with contextlib.suppress(OSError):
                connection.sendall(head + b" " * 3_900_000)
        refused = 0
        for connection in held:
            with contextlib.suppress(OSError):
                refused += connection.recv(12) == b"HTTP/1.1 503"
        assert refused >= 40 and server.resident() - before < 100 << 20
        for connection in held:
            connection.close()
        wait_for(lambda: server.post("/tokenize", b'{"prompt": "ab"}')[0] == 200)


def test_connections_are_bounded(engine: DoubleEngine, tmp_path: Path) -> None:
    with running(app_of(engine, tmp_path), limited(4)) as url:
        port = int(url.rpartition(":")[2])
        held = [socket.create_connection(("127.0.0.1", port)) for _ in range(4)]
        time.sleep(0.1)
        assert raw(url, b"").startswith(b"HTTP/1.1 503 ")
        held.pop().close()
        time.sleep(0.1)
        assert raw(url, b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").startswith(
            b"HTTP/1.1 200"
        )
        for connection in held:
            connection.close()


POST = b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n"
BODY = b'{"prompt": "A", "max_tokens": 1}'


@pytest.mark.parametrize(
    "data",
    [
        POST + b"Host: x\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n" + BODY,
        POST + b"Host: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcdefgh\r\n0\r\n\r\n",
        POST + b"Host: x\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n" + BODY,
        POST + b"Host: x\r\nTransfer-Encoding: gzip\r\n\r\n" + BODY,
        POST + b"Host: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        POST + b"Host: x\r\nTransfer-Encoding: xchunked\r\nContent-Length: 32\r\n\r\n" + BODY,
        POST + b"Content-Length: 32\r\n\r\n" + BODY,
        POST + b"Host: x\r\nHost: y\r\nContent-Length: 32\r\n\r\n" + BODY,
        POST + b"Host: x\r\nContent-Length: 32\r\nContent-Length: 33\r\n\r\n" + BODY,
        POST + b"Host: x\r\nContent-Length: -1\r\n\r\n" + BODY,
    ],
    ids=["size", "longer", "huge", "gzip", "two", "unknown", "no host", "two hosts", "two lengths", "negative"],
)
def test_what_is_no_http_gets_a_400(engine: DoubleEngine, tmp_path: Path, data: bytes) -> None:
    with running(app_of(engine, tmp_path)) as url:
        answer = raw(url, data)
        assert answer.startswith(b"HTTP/1.1 400 "), answer[:200]
        assert answer.count(b"HTTP/1.1 ") == 1 and json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        good = (
            POST + b"Host: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n20\r\n" + BODY + b"\r\n0\r\n\r\n"
        )
        assert raw(url, good).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(("path", "words"), [("/v1/v1/completions", "/v1/completions"), ("/completions", "/v1/comple")])
def test_a_wrong_base_url_gets_a_hint(engine: DoubleEngine, tmp_path: Path, path: str, words: str) -> None:
    answer = TestClient(app_of(engine, tmp_path)).post(path, json={})
    assert answer.status_code == 404 and words in answer.json()["error"]["message"]
