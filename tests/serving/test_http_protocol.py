"""What a connection may send before a body: so many bytes, in so much time."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.server import http_protocol
from serving.server.app import build_app
from serving.server.settings import Settings
from tests.serving.double_engine import DoubleEngine, registry_of
from tests.serving.live_server import running

POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture
def port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.4)
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


@pytest.mark.parametrize("begin", [b"GET / HTTP/1.1\r\nX: ", b"GET /", b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 3])
def test_a_head_without_end_is_refused(port: int, begin: bytes) -> None:
    got = answer(port, begin, *[b"a" * 4096] * 17)
    assert got.startswith(b"HTTP/1.1 431 ") and b"more than 65536 bytes" in got
    assert json.loads(got.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


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
            got = b""
            while b'"usage"' not in got:
                part = connection.recv(65536)
                assert part, got
                got += part
            assert got.startswith(b"HTTP/1.1 200 ")
