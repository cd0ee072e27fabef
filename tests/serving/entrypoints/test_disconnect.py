"""Clients that go away: their slots are free within a step, whatever they were doing."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.engine.api import GenerationRequest
from serving.entrypoints.http_app import build_app
from serving.sampling import SamplingParams
from serving.server.event_queue import EventQueue
from serving.server.settings import Settings
from tests.serving.double_engine import DoubleEngine, registry_of
from tests.serving.live_server import running
from tests.serving.server.test_middleware import wait_for


@pytest.fixture
def engine() -> Iterator[DoubleEngine]:
    engine = DoubleEngine(slots=4, queue=2000)
    yield engine
    engine.close()


def ask(url: str, **fields: object) -> socket.socket:
    """A connection on which a long completion has been asked for."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": [1], "max_tokens": 900, "ignore_eos": True, **fields}).encode()
    connection = socket.create_connection((host, int(port)))
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        + b"Content-Length: %d\r\n\r\n" % len(body)
        + body
    )
    return connection


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_goes_away_frees_its_slots(engine: DoubleEngine, tmp_path: Path, stream: bool, n: int) -> None:
    engine.pace = 0.01
    with running(build_app(registry_of(engine, tmp_path / "tiny"), Settings())) as url:
        connection = ask(url, stream=stream, n=n)
        wait_for(lambda: engine.stats().active_slots == n)
        if stream:
            assert connection.recv(10) == b"HTTP/1.1 2"
        before = engine.stats().generated_tokens
        connection.close()
        wait_for(lambda: engine.stats().active_slots == 0)
        assert engine.stats().generated_tokens - before < 60 * n


def test_a_client_that_goes_away_leaves_the_queue(
    engine: DoubleEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine.paused.set()
    with (
        caplog.at_level(logging.INFO, "gpt2_bundle.access"),
        running(build_app(registry_of(engine, tmp_path / "tiny"), Settings())) as url,
    ):
        connection = ask(url)
        wait_for(lambda: engine.stats().waiting_requests == 1)
        connection.close()
        wait_for(lambda: engine.stats().waiting_requests == 0)
        wait_for(lambda: [vars(record)["status"] for record in caplog.records if "status" in vars(record)] == [499])


def test_what_a_call_leaves_open_is_cancelled(engine: DoubleEngine) -> None:
    engine.pace = 0.05  # 45 seconds for all of it.
    long = GenerationRequest((1,), SamplingParams(max_new_tokens=900, ignore_eos=True))

    async def first_events() -> None:
        generation = await EventQueue.open(engine, [long, long])
        assert await generation.next()
        generation.close()
        generation.close()

    asyncio.run(first_events())
    wait_for(lambda: engine.stats().active_slots == 0)


def test_a_thousand_clients_that_come_and_go_leak_no_slot(engine: DoubleEngine, tmp_path: Path) -> None:
    chance = random.Random(3)
    app = build_app(registry_of(engine, tmp_path / "tiny"), Settings())
    with running(app) as url:
        open_ones: list[socket.socket] = []
        for _ in range(1000):
            open_ones.append(ask(url, stream=chance.random() < 0.7, max_tokens=chance.randint(1, 30)))
            if len(open_ones) > chance.randint(0, 30):
                connection = open_ones.pop(chance.randrange(len(open_ones)))
                if chance.random() < 0.5:
                    connection.recv(chance.randint(1, 500))
                connection.close()
            if chance.random() < 0.02:
                time.sleep(0.001)
        for connection in open_ones:
            connection.close()
        wait_for(lambda: engine.stats().active_slots == 0 and engine.stats().waiting_requests == 0)
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
            connection.sendall(b"GET /health/ready HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
