"""What must not harm a server: more load than it can take, clients that go away, and its end under load."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import socket
import time
from typing import Any

from benchmarks.common.own_server import OwnServer
from benchmarks.serving.load import address_of, end_load, load, start_load
from serving.errors import GPT2BundleError

_CONNECTIONS = 1000


def overload(server: OwnServer, sizes: dict[str, int], seconds: float, overload_seconds: float) -> dict[str, Any]:
    """Requests at 10 times the rate that 16 closed-loop clients get through, and memory once a second meanwhile.

    Raises GPT2BundleError if those get nothing through.
    """
    calm = load(server.url, clients=16, seconds=seconds, **sizes)
    capacity = calm["outcomes"].get("complete", 0) / seconds
    if not capacity:
        raise GPT2BundleError(
            f"no request was completed in {seconds:g} s, but {calm['outcomes']}; ask for less or wait longer"
        )
    process = start_load(server.url, rate=10 * capacity, seconds=overload_seconds, seed=1, **sizes)
    memory = []
    while process.poll() is None:
        memory.append(server.resident_bytes())
        time.sleep(1)
    over = end_load(process)
    return {"calm": calm, "capacity_per_second": capacity, "overload": over, "resident_bytes": memory}


def disconnects(server: OwnServer) -> dict[str, Any]:
    """Connect 1,000 times and go away at a random time: before, within or after the request, or within the answer."""
    address, draw = address_of(server.url), random.Random(0)
    body = json.dumps({"prompt": "A", "max_tokens": 200, "ignore_eos": True, "stream": True}).encode()
    request = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    request += b"Content-Length: %d\r\n\r\n" % len(body) + body
    went: list[socket.socket] = []
    answered = 0
    for _ in range(_CONNECTIONS):
        connection = socket.create_connection(address)
        kind = draw.randrange(4)
        if kind:
            connection.sendall(request[: draw.randrange(len(request))] if kind == 1 else request)
        if kind == 3:
            connection.settimeout(draw.random() * 0.1)
            with contextlib.suppress(TimeoutError):
                answered += bool(connection.recv(1 << 16))
        went.append(connection)
        # Up to eight stay open for a while, so that slots and queue are used.
        while len(went) > draw.randrange(9):
            went.pop(draw.randrange(len(went))).close()
    for connection in went:
        connection.close()
    began = time.monotonic()
    while (left := _held(server)) and time.monotonic() < began + 10:
        time.sleep(0.05)
    seconds = time.monotonic() - began
    return {"connections": _CONNECTIONS, "answers_begun": answered, "slots_left": left, "seconds_to_free": seconds}


def _held(server: OwnServer) -> float:
    return server.metric("num_requests_running") + server.metric("num_requests_waiting")


def termination(server: OwnServer, sizes: dict[str, int]) -> dict[str, Any]:
    """SIGTERM while 24 clients ask 16 slots: every request must end complete, or be refused whole."""
    process = start_load(server.url, clients=24, seconds=4, **sizes)
    time.sleep(3)
    server.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    code = server.process.wait(60)
    seconds = time.monotonic() - began
    outcomes = end_load(process)["outcomes"]
    lost = sum(outcomes.get(name, 0) for name in ("broken off", "error event", "hung"))
    return {"exit_code": code, "seconds_to_end": seconds, "outcomes": outcomes, "lost": lost}
