"""The load generator counts what a server really did."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from benchmarks.serving.engine import bare
from benchmarks.serving.load import quantiles, run
from serving.entrypoints.http_app import build_app
from serving.server.settings import Settings
from tests.serving.double_engine import DoubleEngine, registry_of
from tests.serving.live_server import running

BODY = {"prompt": [1, 2, 3, 4, 5], "max_tokens": 8, "temperature": 0, "stream": True, "ignore_eos": True, "logprobs": 0}


@pytest.mark.parametrize("usage", [True, False])
def test_a_closed_loop_counts_tokens_and_outcomes(tmp_path: Path, usage: bool) -> None:
    engine = DoubleEngine(pace=0.001)
    body = {**BODY, "stream_options": {"include_usage": True}} if usage else BODY
    with running(build_app(registry_of(engine, tmp_path / "tiny"), Settings())) as url:
        result = asyncio.run(run(url, body, 3, 0.5, None, 0))
    outcomes = result["outcomes"]
    assert set(outcomes) == {"complete", "hung"} and outcomes["hung"] == 0 < outcomes["complete"]
    if usage:
        assert result["tokens"] == pytest.approx(8 * outcomes["complete"])
    assert engine.generated == 8 * outcomes["complete"]
    engine.close()


def test_the_same_loop_over_an_engine_counts_as_much() -> None:
    engine = DoubleEngine(pace=0.001)
    result = bare(engine, 3, 0.3, prompt_tokens=5, new_tokens=8, seed=0)
    complete = result["outcomes"]["length"]
    assert complete > 0 and engine.generated == 8 * complete == result["tokens"]
    engine.close()


def test_an_open_loop_sees_refusals(tmp_path: Path) -> None:
    engine = DoubleEngine(slots=1, queue=0, pace=0.01)
    with running(build_app(registry_of(engine, tmp_path / "tiny"), Settings())) as url:
        result = asyncio.run(run(url, {**BODY, "max_tokens": 2}, 1, 0.3, 100, 0))
    assert result["outcomes"]["429"] > 0 and result["refusal_s"]["p50"] < 1
    engine.close()


def test_a_server_that_is_not_there_is_an_outcome() -> None:
    result = asyncio.run(run("http://127.0.0.1:9", BODY, 1, 0.1, None, 0))
    assert set(result["outcomes"]) == {"no connection", "hung"} and result["inter_token_s"] is None


def test_quantiles_are_of_the_nearest_rank() -> None:
    assert quantiles([float(value) for value in range(100)]) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
