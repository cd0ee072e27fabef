"""Sampling on the device, with the logits fetched only for rows whose token is not certain."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from serving.backends.base import SamplingRequest
from serving.engine.requests import EngineSequence
from serving.engine.sampler import Sampled, sample
from serving.engine.slot_backend import DeviceSamplingSlotBackend
from serving.generation.token_selection import MAX_CANDIDATES, USUAL_CANDIDATES
from serving.sampling import SamplingParams, SamplingRows, uniform
from serving.sampling.penalties import join_logits_processors

_NOBODY = SamplingParams()


def needs_logits(sequences: Sequence[EngineSequence | None]) -> bool:
    """Whether somebody asks for log-probabilities, or for a grammar, which are computed here."""
    return any(
        sequence is not None
        and (
            sequence.request.scoring
            or sequence.request.submitted.logprobs is not None
            or sequence.constraint is not None
        )
        for sequence in sequences
    )


def sample_on_device(backend: DeviceSamplingSlotBackend, sequences: Sequence[EngineSequence | None]) -> list[Sampled]:
    """What `sample` gives for the rows of the backend's last `advance`, none of which needs logits."""
    sampled = backend.sample_tokens(_request(sequences, backend.vocab_size))
    # An idle row has arbitrary values.
    sure = [sequence if exact else None for sequence, exact in zip(sequences, sampled.exact.tolist(), strict=True)]
    unsure = [None if exact else sequence for sequence, exact in zip(sequences, sampled.exact.tolist(), strict=True)]
    found = [
        Sampled(sequence, token)
        for sequence, token in zip(sure, sampled.tokens.tolist(), strict=True)
        if sequence is not None
    ]
    return found + sample(backend.logits(), unsure) if any(unsure) else found


def _request(sequences: Sequence[EngineSequence | None], vocab_size: int) -> SamplingRequest:
    each = [_NOBODY if sequence is None else sequence.params for sequence in sequences]
    num_generated = [0 if sequence is None else sequence.num_generated for sequence in sequences]
    seeds = [0 if sequence is None else sequence.seed for sequence in sequences]
    sampling = SamplingRows.of(each)
    wanted = np.where(sampling.top_k > 0, sampling.top_k, USUAL_CANDIDATES)[~sampling.greedy]
    penalty_states = [None if sequence is None else sequence.penalty_state for sequence in sequences]
    return SamplingRequest(
        sampling,
        uniform(np.array(seeds, np.int64), np.array(num_generated, np.int64)),
        join_logits_processors(
            [None if penalty_state is None else penalty_state.logits_processor for penalty_state in penalty_states]
        ),
        min(int(wanted.max(initial=1)), MAX_CANDIDATES, vocab_size),
    )
