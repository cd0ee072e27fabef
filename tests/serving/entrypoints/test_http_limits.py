"""What a connection may send before a body: so many bytes, in so much time."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.entrypoints import http_limits
from serving.entrypoints.http_app import build_app
from serving.server.settings import Settings
from tests.serving.double_engine import DoubleEngine, registry_of
from tests.serving.live_server import running

POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture
def port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(http_limits, "HEAD_SECONDS", 0.4)
    engine = DoubleEngine()
    with running(build_app(registry_of(engine, tmp_path / "tiny"), Settings())) as url:
        yield int(url.rpartition(":")[2])
    engine.close()


def answer(port: int, *pieces: bytes) -> bytes:
    """Everything that comes back until the server closes or is silent."""
    with socket.create_connection(("127.0.0.1", port), timeout=3) as connection:
        got = b""
        try:
            for piece in pieces:
                connection.sendall(piece)
            while part := connection.recv(65536):
                got += part
        except (ConnectionResetError, BrokenPipeError):
            pass
        return got


def assert_completed(connection: socket.socket) -> None:
    """Read a whole completion, of which the usage is the last field."""
    got = b""
    while b'"usage"' not in got:
        part = connection.recv(65536)
        assert part, got
        got += part
    assert got.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("begin", [b"GET / HTTP/1.1\r\nX: ", b"GET /", b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 3])
def test_a_head_without_end_is_refused(port: int, begin: bytes) -> None:
    got = answer(port, begin, *[b"a" * 4096] * 17)
    assert got.startswith(b"HTTP/1.1 431 ") and b"more than 65536 bytes" in got
    assert json.loads(got.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


def head_and_body(got: bytes) -> tuple[bytes, bytes]:
    head, _, body = got.partition(b"\r\n\r\n")
    return head.lower(), body


@pytest.mark.parametrize("more", [b"", b"Connection: keep-alive\r\n"])
def test_http_1_0_gets_a_stream_that_ends_with_the_connection(port: int, more: bytes) -> None:
    body = json.dumps({"prompt": "A", "max_tokens": 3, "temperature": 0, "stream": True}).encode()
    rest = b"Content-Length: %d\r\n%b\r\n%b" % (len(body), more, body)
    head, old = head_and_body(answer(port, POST.replace(b"1.1", b"1.0") + rest))
    assert b" 200 " in head and b"transfer-encoding" not in head and b"connection: close" in head
    assert old.startswith(b"data: {") and old.endswith(b"data: [DONE]\n\n")
    head, new = head_and_body(answer(port, POST + b"Connection: close\r\n" + rest))
    assert b"transfer-encoding: chunked" in head and new.endswith(b"0\r\n\r\n")
    head, whole = head_and_body(answer(port, b"GET /v1/models HTTP/1.0\r\n" + more + b"\r\n"))
    assert b"content-length: %d" % len(whole) in head and json.loads(whole)["object"] == "list"
    head, none = head_and_body(answer(port, b"HEAD /v1/models HTTP/1.0\r\n" + more + b"\r\n"))
    assert b"content-length: %d" % len(whole) in head and none == b""


def test_what_is_no_http_is_refused_in_the_form_of_the_rest(port: int) -> None:
    both = b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}"
    for data in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", b"hello\r\n\r\n", POST + both):
        head, body = head_and_body(answer(port, data))
        assert head.startswith(b"http/1.1 400 ") and b"connection: close" in head
        assert json.loads(body)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("protocol", [b"websocket", b"h2c"])
def test_an_upgrade_is_not_taken_and_nobody_is_told_to_install_it(
    port: int, protocol: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    body = b'{"prompt": "A", "max_tokens": 1}'
    ask = POST + b"Upgrade: %b\r\nContent-Length: %d\r\nConnection: Upgrade" % (protocol, len(body))
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        for at, end in ((40, b""), (150, b", close")):  # Inside of the head, and behind it.
            data = ask + end + b"\r\n\r\n" + body
            connection.sendall(data[:at])
            time.sleep(0.02)
            connection.sendall(data[at:])
            assert_completed(connection)
        assert connection.recv(1) == b""
    many = answer(port, (ask + b"\r\n\r\n" + body) * 50 + POST + b"Connection: close\r\n\r\n")
    assert many.count(b'"usage"') == 50 and many.count(b"HTTP/1.1 400 ") == 1
    assert answer(port, b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert not [record for record in caplog.records if "pip install" in record.getMessage()]


def test_a_trailer_without_end_is_cut_off(port: int) -> None:
    got = answer(port, POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX: ", *[b"a" * 4096] * 64)
    assert b"HTTP/1.1 200" not in got


def test_a_head_that_does_not_come_is_not_waited_for(port: int) -> None:
    assert answer(port, b"GET / HT").startswith(b"HTTP/1.1 408 ")
    assert answer(port) == b""


def test_a_slow_or_long_request_that_keeps_coming_is_answered(port: int) -> None:
    body = json.dumps({"prompt": "A", "max_tokens": 2, "user": "u" * 300_000}).encode()
    head = POST + f"Content-Length: {len(body)}\r\nX: {'y' * 60_000}\r\n".encode()
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        for _ in range(2):  # The second on the same connection.
            data = head + b"\r\n" + body
            for at in range(0, len(data), 7001):
                connection.sendall(data[at : at + 7001])
            assert_completed(connection)
