"""A token that is certain stays the same whatever the logits are within the tolerance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from serving.sampling import SamplingParams, SamplingRows, sample_tokens
from serving.sampling.certainty import absolute_tolerance, is_certain, is_far_ahead

TOLERANCE = 2e-3


def token(line: Any, params: SamplingParams, step: int) -> int:
    arrays = SamplingRows.of([params]).arrays()
    return int(sample_tokens(line[None], seed=np.array([params.seed]), step=np.array([step]), **arrays)[0])


@pytest.mark.parametrize("vocab", [5, 300, 3000])
@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 0.2},
        {"temperature": 3.0, "top_p": 0.5},
        {"temperature": 0.7, "top_k": 3},
        {"temperature": 0.7, "top_k": 40, "top_p": 0.8},
        {"temperature": 0.9, "min_p": 0.2},
        {"temperature": 1.0, "top_p": 0.9, "min_p": 0.05},
    ],
)
def test_certain_tokens_do_not_change(parameters: dict[str, Any], vocab: int) -> None:
    """Adversarial changes too: up for the token's neighbours and down for itself, or the other way round."""
    rng = np.random.default_rng(vocab)
    certain = 0
    for step in range(60):
        params = SamplingParams(seed=step, **parameters)
        line = (rng.normal(size=vocab) * 2).astype(np.float32)
        if step % 2:
            # A near tie, which is not certain.
            line[rng.integers(0, vocab, 2)] = line.max()
        line += rng.normal(size=vocab).astype(np.float32) * np.float32(TOLERANCE)
        chosen = token(line, params, step)
        if not is_certain(line, chosen, params, params.seed, step, TOLERANCE):
            continue
        certain += 1
        above = line > line[chosen]
        for change in (
            *(rng.uniform(-1, 1, vocab) for _ in range(8)),
            np.where(above, 1, -1),
            np.where(above, -1, 1),
            np.where(np.arange(vocab) == chosen, -1, 1),
            np.sign(rng.normal(size=vocab)),
        ):
            other = line + (change * TOLERANCE * 0.999).astype(np.float32)
            assert token(other, params, step) == chosen
    assert certain >= 3


def test_most_tokens_are_certain_at_the_tolerance_of_fp32() -> None:
    rng = np.random.default_rng(0)
    lines = (rng.normal(size=(100, 5000)) * 3).astype(np.float32)
    for parameters in ({}, {"temperature": 0.8}, {"temperature": 0.8, "top_p": 0.9}):
        params = SamplingParams(seed=1, **parameters)
        count = sum(
            is_certain(line, token(line, params, step), params, params.seed, step, 1e-5)
            for step, line in enumerate(lines)
        )
        assert count >= 90, parameters


def test_a_greedy_tie_is_not_certain() -> None:
    line = np.array([1, 3, 3, 0], np.float32)
    assert not is_certain(line, 1, SamplingParams(), 0, 0, 1e-6)
    assert is_certain(line[[0, 1, 3]], 1, SamplingParams(), 0, 0, 0.9)
    assert not is_certain(line[[0, 1, 3]], 1, SamplingParams(), 0, 0, 1.0)


def test_what_is_far_ahead_is_certain() -> None:
    """The quick bound never says more than the exact rule, and says it of nearly all rows of a spread model."""
    random = np.random.default_rng(5)
    ahead = 0
    for number in range(400):
        line = (random.standard_normal(300) * 10.0 ** random.integers(-3, 3)).astype(np.float32)
        if number % 3 == 0:
            line[random.integers(300)] = -np.inf
        params = SamplingParams(repetition_penalty=1.0 + number % 2)
        token, share = int(line.argmax()), 10.0 ** -float(random.integers(2, 6))
        if is_far_ahead(line, token, params, share):
            ahead += 1
            assert is_certain(line, token, params, 0, 0, absolute_tolerance(line, params, share))
    assert ahead > 100
    assert not is_far_ahead(line, token, SamplingParams(temperature=0.5), 1e-9)
