"""`gpt2-bundle client` before a server that is wrong, hostile or slow: one line, in bounded time and memory."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from serving.cli import run
from tests.serving.raw_server import read_request

MODEL = json.dumps({"object": "model", "id": "tiny"}).encode()
METADATA = json.dumps({"metadata": {"signature_def": {"signature_def": {}}}}).encode()
CHOICE = {"index": 0, "text": "a", "finish_reason": "stop"}


def answer(body: bytes, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % size + body


@contextlib.contextmanager
def serving(completion: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that has slots for nobody, a card of the model, and `completion` for what is asked of it."""
    listener = socket.create_server(("127.0.0.1", 0))

    def one(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            head = read_request(connection)
            if b"/completions" in head:
                completion(connection)
            elif head.startswith(b"GET /v1/models/tiny "):
                connection.sendall(answer(MODEL))
            else:
                connection.sendall(answer(METADATA))

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=one, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


def ask(url: str, *more: str) -> int:
    return run(["client", "generate", "A", "--url", url, "--model", "tiny", "--timeout", "2", "--retries", "0", *more])


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


MALFORMED: list[Any] = [
    {},
    [],
    3,
    {"choices": None},
    {"choices": [3]},
    {"choices": [{}]},
    {"choices": [{**CHOICE, "index": 7}]},
    {"choices": [{**CHOICE, "index": -1}]},
    {"choices": [{**CHOICE, "index": True}]},
    {"choices": [{**CHOICE, "text": None}]},
    {"choices": [{**CHOICE, "finish_reason": {}}]},
    {"error": 3},
    {"error": {"message": ["x" * 1_000_000]}},
    {"error": {"message": "\x1b[2J" + "y\n" * 100_000}},
]


@pytest.mark.parametrize("value", MALFORMED, ids=range(len(MALFORMED)))
@pytest.mark.parametrize("streamed", [True, False])
def test_a_malformed_answer_is_one_line(value: Any, streamed: bool, capfd: pytest.CaptureFixture[str]) -> None:
    body = event(value) if streamed else json.dumps(value).encode()
    with serving(lambda connection: connection.sendall(answer(body))) as url:
        assert ask(url, "--stream" if streamed else "--stop=x") == 1
    error = capfd.readouterr().err
    assert "404" not in error.replace(url, "") and len(error.splitlines()) == 1 and url in error and len(error) < 600
    assert "Traceback" not in error and "internal error" not in error and "\x1b" not in error


def test_a_line_without_end_is_cut_off(capfd: pytest.CaptureFixture[str]) -> None:
    def endless(connection: socket.socket) -> None:
        connection.sendall(answer(b"data: ", 1 << 40))
        while True:
            connection.sendall(b"x" * 1_000_000)

    with serving(endless) as url:
        began = time.monotonic()
        assert ask(url, "--stream", "--timeout", "60") == 1
        assert time.monotonic() - began < 20
    assert "too long" in capfd.readouterr().err


@pytest.mark.parametrize("more", ["--stream", "--stop=x"])
def test_the_deadline_holds_for_bytes_that_trickle(more: str, capfd: pytest.CaptureFixture[str]) -> None:
    def trickle(connection: socket.socket) -> None:
        connection.sendall(answer(b"", 1000))
        while True:
            connection.sendall(b" ")
            time.sleep(0.2)

    with serving(trickle) as url:
        began = time.monotonic()
        assert ask(url, more) == 1
        assert time.monotonic() - began < 20
    assert "deadline" in capfd.readouterr().err


def test_text_gives_no_orders_to_a_terminal() -> None:
    text = "a\x1b]0;owned\x07b\nc\td"
    body = event({"choices": [{**CHOICE, "text": text}]}) + b"data: [DONE]\n\n"
    with serving(lambda connection: connection.sendall(answer(body))) as url:
        arguments = ["client", "generate", "A", "--url", url, "--model", "tiny", "--stream"]
        command = [sys.executable, "-c", f"from serving.cli import run; raise SystemExit(run({arguments!r}))"]
        ours, theirs = pty.openpty()
        subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, check=True, timeout=60)
        os.close(theirs)
        shown = os.read(ours, 4096)
        os.close(ours)
        piped = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout.decode()
    assert b"\x1b" not in shown and b"a\\x1b]0;owned\\x07b" in shown
    assert piped == text + "\n", "a pipe gets the text as it is"
