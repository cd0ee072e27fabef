"""Bias and penalties: the sparse edits of a batch are the definitions, row by row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.sampling import SamplingParams, sample_tokens
from serving.sampling.penalties import PenaltyState

SIZE = 12
TOKENS = st.lists(st.integers(0, SIZE - 1), max_size=20)
PARAMS = st.builds(
    SamplingParams,
    repetition_penalty=st.sampled_from([1.0, 1.5, 0.5]),
    presence_penalty=st.sampled_from([0.0, 1.25, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5, -0.25]),
    logit_bias=st.dictionaries(st.integers(0, SIZE - 1), st.sampled_from([-100.0, 0.5, 3.0]), max_size=3),
)


def by_definition(logits: list[float], prompt: list[int], made: list[int], params: SamplingParams) -> list[float]:
    """All numbers are sums of few powers of two, so float64 and float32 agree but for the division."""
    result = []
    for token, logit in enumerate(logits):
        logit += dict(params.logit_bias).get(token, 0.0)
        if token in prompt or token in made:
            logit = logit / params.repetition_penalty if logit > 0 else logit * params.repetition_penalty
        logit -= params.frequency_penalty * made.count(token) + params.presence_penalty * (token in made)
        result.append(logit)
    return result


@given(st.lists(st.tuples(TOKENS, TOKENS, PARAMS), min_size=1, max_size=4))
@settings(derandomize=True, deadline=None, max_examples=200)
def test_edits_are_the_definitions(rows: list[tuple[list[int], list[int], SamplingParams]]) -> None:
    prompts, made, params = (list(column) for column in zip(*rows, strict=True))
    penalty_state = PenaltyState(prompts, params)
    logits = np.random.default_rng(0).integers(-16, 16, (len(rows), SIZE)).astype(np.float32) / 4
    for place in range(max(map(len, made))):
        for row, tokens in enumerate(made):
            if place < len(tokens):
                penalty_state.add(row, tokens[place])
    edited = penalty_state.logits_processor.apply(logits, np.arange(len(rows)))
    for row in range(len(rows)):
        wanted = by_definition(logits[row].tolist(), prompts[row], made[row], params[row])
        # A penalty may nearly cancel a logit, which leaves the rounding of the logit.
        np.testing.assert_allclose(edited[row], wanted, rtol=3e-7, atol=1e-6)
        np.testing.assert_array_equal(
            penalty_state.logits_processor.apply(logits[[row]], np.array([row]))[0], edited[row]
        )
    if penalty_state.empty:
        np.testing.assert_array_equal(edited, logits)


@pytest.mark.parametrize(
    ("fields", "empty"),
    [
        ({}, True),
        ({"min_tokens": 3}, False),
        ({"min_tokens": 3, "ignore_eos": True}, True),
        ({"repetition_penalty": 1.5}, False),
        ({"presence_penalty": 1.0}, False),
        ({"frequency_penalty": 1.0}, False),
        ({"logit_bias": {3: 1.0}}, False),
    ],
)
def test_a_history_is_empty_where_nothing_it_may_say_changes_a_logit(fields: dict[str, Any], empty: bool) -> None:
    assert PenaltyState([[1, 2]], [SamplingParams(**fields)], eos_token_id=0).empty == empty
    assert PenaltyState([[1], [2]], [SamplingParams(), SamplingParams(**fields)], eos_token_id=0).empty == empty


@pytest.mark.oracle
def test_transformers_processors_keep_the_same_tokens() -> None:
    """Temperature, top-k, top-p and min-p in transformers' order leave the tokens that our draws fall on."""
    import torch
    from transformers.generation import logits_process as processors

    random = np.random.default_rng(0)
    for temperature, top_k, top_p, min_p, repetition in [
        (0.7, 5, 0.8, 0.1, 1.3),
        (1.5, 0, 0.6, 0.02, 0.8),
        (1.0, 8, 1.0, 0.25, 2.0),
    ]:
        logits = 2 * random.standard_normal((1, SIZE)).astype(np.float32)
        prompt = random.integers(0, SIZE, 4).tolist()
        params = SamplingParams(repetition_penalty=repetition)
        ours = PenaltyState([prompt], [params]).logits_processor.apply(logits, np.arange(1))
        theirs = processors.RepetitionPenaltyLogitsProcessor(repetition)(torch.tensor([prompt]), torch.tensor(logits))
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)
        chain = [processors.TemperatureLogitsWarper(temperature)]
        chain += [processors.TopKLogitsWarper(top_k)] if top_k else []
        chain += [processors.TopPLogitsWarper(top_p), processors.MinPLogitsWarper(min_p)]
        for each in chain:
            theirs = each(torch.tensor([prompt]), theirs)
        wanted = theirs.softmax(-1).numpy()[0]
        rows = np.repeat(ours, 20_000, 0)
        chosen = sample_tokens(rows, temperature, top_k, top_p, np.arange(20_000), 0, min_p)
        share = np.bincount(chosen, minlength=SIZE) / 20_000
        assert set(np.flatnonzero(share)) == set(np.flatnonzero(wanted))
        assert np.abs(share - wanted).max() < 0.015
