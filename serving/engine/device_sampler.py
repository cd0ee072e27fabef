"""Sampling on the device, with the logits fetched only for rows whose token is not certain."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from serving.backends.base import Request
from serving.engine.requests import Continuation
from serving.engine.sampler import Sampled, sample
from serving.engine.slot_backend import ChoosingSlotBackend
from serving.generation.token_selection import MAX_CANDIDATES, USUAL_CANDIDATES
from serving.sampling import SamplingParams, SamplingRows, uniform
from serving.sampling.penalties import join_edits

_NOBODY = SamplingParams()


def needs_logits(owners: Sequence[Continuation | None]) -> bool:
    """Whether somebody asks for log-probabilities, or for a grammar, which are computed here."""
    return any(
        owner is not None
        and (owner.task.scoring or owner.task.request.logprobs is not None or owner.constraint is not None)
        for owner in owners
    )


def sample_there(backend: ChoosingSlotBackend, owners: Sequence[Continuation | None]) -> list[Sampled]:
    """What `sample` gives for the rows of the backend's last `advance`, none of which needs logits."""
    choice = backend.choose(_request(owners, backend.vocab_size))
    # An idle row has arbitrary values.
    sure = [owner if exact else None for owner, exact in zip(owners, choice.exact.tolist(), strict=True)]
    unsure = [None if exact else owner for owner, exact in zip(owners, choice.exact.tolist(), strict=True)]
    found = [
        Sampled(owner, token) for owner, token in zip(sure, choice.tokens.tolist(), strict=True) if owner is not None
    ]
    return found + sample(backend.logits(), unsure) if any(unsure) else found


def _request(owners: Sequence[Continuation | None], vocab_size: int) -> Request:
    each = [_NOBODY if owner is None else owner.params for owner in owners]
    made = [0 if owner is None else owner.made for owner in owners]
    seeds = [0 if owner is None else owner.seed for owner in owners]
    sampling = SamplingRows.of(each)
    wanted = np.where(sampling.top_k > 0, sampling.top_k, USUAL_CANDIDATES)[~sampling.greedy]
    histories = [None if owner is None else owner.history for owner in owners]
    return Request(
        sampling,
        uniform(np.array(seeds, np.int64), np.array(made, np.int64)),
        join_edits([None if history is None else history.edits for history in histories]),
        min(int(wanted.max(initial=1)), MAX_CANDIDATES, vocab_size),
    )
