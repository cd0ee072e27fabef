"""What the suite's own client adds: the same measurements of a server that has nothing to do."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from benchmarks.suite.driver import play
from benchmarks.suite.figures.latency_metrics import mean_and_quantiles, samples
from benchmarks.suite.load.clock import Clock
from benchmarks.suite.load.schedule import Lengths, Planner
from benchmarks.suite.targets.openai import OpenAITarget
from serving.errors import ServerError


@contextmanager
def fake_process(first: float, step: float) -> Iterator[tuple[str, int]]:
    """Run `fake_server` in a process of its own, and give its address and process id. Times are seconds."""
    command = [sys.executable, "-m", "benchmarks.suite.selfcheck.fake_server", f"--first={first}", f"--step={step}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = process.stdout.readline().strip()
            if not port:
                raise ServerError("the fake server did not start", "UNAVAILABLE")
            yield f"http://127.0.0.1:{port}", process.pid
        finally:
            process.terminate()


def lateness(address: str) -> float:
    """Seconds by which a fake server missed its own schedule at worst, as it says itself."""
    with urllib.request.urlopen(f"{address}/v1/models", timeout=10) as answer:
        return float(json.load(answer)["lateness"])


async def client_overhead(clock: Clock, count: int = 50, tokens: int = 32) -> dict[str, Any]:
    """Latencies (ms, p50, p90 and p99) of the null server over HTTP, one request at a time: the least to be seen."""
    with fake_process(0.0, 0.0) as (address, _):
        target = OpenAITarget("fake", address)
        await target.start()
        schedule = Planner(range(1, 100), 1024).single(count, Lengths(64, 64), Lengths(tokens, tokens))
        responses = await play(schedule, target, clock)
    found: dict[str, Any] = {}
    for latency in ("ttft", "inter_token", "e2e"):
        values = np.sort(samples(responses, latency)[0]) * 1e3
        found[f"{latency}_ms"] = mean_and_quantiles(values)[1:] if len(values) else None
    return found
