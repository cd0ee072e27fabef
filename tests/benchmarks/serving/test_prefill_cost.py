"""The cost model of prefill chunks: the fit and the bound against brute force, and a run on real graphs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.serving.prefill_cost import ChunkCost, first_token_ms, fit, main, verdict
from serving.errors import InputError

COST = ChunkCost(3.3, 0.0125, 0.13, 0.00005)
PLACES = [(tokens, start) for tokens in (2, 8, 64, 128) for start in (0, 450, 900)]


def test_the_fit_finds_the_cost_that_made_the_samples() -> None:
    found = fit([(tokens, start, COST.ms(tokens, start)) for tokens, start in PLACES])
    assert [found.weights, found.cached, found.token, found.attention] == pytest.approx([3.3, 0.0125, 0.13, 0.00005])
    noise = np.random.default_rng(0).uniform(0.95, 1.05, len(PLACES))
    noisy = fit([(*place, COST.ms(*place) * by) for place, by in zip(PLACES, noise, strict=True)])
    assert all(noisy.ms(*place) == pytest.approx(COST.ms(*place), rel=0.1) for place in PLACES)
    # What would come out below zero is left out: a chunk never costs less for more cached positions.
    falling = fit([(tokens, start, 10 - 0.002 * start + 0.2 * tokens) for tokens, start in PLACES])
    assert falling.cached == 0 and min(falling.weights, falling.token, falling.attention) >= 0


@pytest.mark.parametrize("decode_ms", [3.2, 5.6, 11.6, 40.0])
def test_the_largest_chunk_is_the_one_that_trying_finds(decode_ms: float) -> None:
    allowed = 2 * decode_ms
    holds = [tokens for tokens in range(2, 2000) if COST.ms(tokens, 900) <= allowed]
    assert COST.largest(900, allowed) == max(holds, default=0)
    row = verdict(COST, decode_ms, 900, 3.0, 250.0)
    assert row["largest_chunk"] == max(holds, default=0)
    assert row["times_with_2_tokens"] == pytest.approx(1 + COST.ms(2, 900) / decode_ms)
    if not holds:
        assert "first_token_over_alone" not in row
        return
    # No chunk makes the first token shorter than times / (times - 1) of what the chunks take.
    total, longest = first_token_ms(COST, decode_ms, 900, lambda start: COST.largest(start, allowed))
    assert longest <= 3 * decode_ms + 1e-9 and total >= 1.5 * _chunks_alone(allowed)
    assert row["fitted_first_token_over_alone"] == pytest.approx(total / 250.0)
    assert row["fitted_first_token_over_alone"] <= row["first_token_over_alone"]


def _chunks_alone(allowed: float) -> float:
    start, total = 0, 0.0
    while start < 900:
        tokens = min(COST.largest(start, allowed), 900 - start)
        start, total = start + tokens, total + COST.ms(tokens, start)
    return total


def test_a_run_on_real_graphs(real_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "cost.json"
    sizes = ["--long-prompt", "40", "--prompt-tokens", "8", "--streams", "1,3", "--repeats", "2"]
    result = CliRunner().invoke(main, [str(real_bundle), *sizes, "--output", str(output)], catch_exceptions=False)
    assert result.exit_code == 0 and "| streams | decode step, ms |" in result.output
    record = json.loads(output.read_text())
    assert set(record["streams"]) == {"1", "3"} and record["first_token_over_chunks_at_least"] == 1.5
    assert len(record["chunks"]) == 9 and all(ms > 0 for *_, ms in record["chunks"])
    with pytest.raises(InputError, match="do not fit a context of 48"):
        CliRunner().invoke(main, [str(real_bundle)], catch_exceptions=False)
