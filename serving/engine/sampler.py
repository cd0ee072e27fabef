"""Sampling of the next token of every row, with the log-probabilities that requests want."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from serving.backends.base import FloatArray
from serving.engine.api import Logprobs
from serving.engine.requests import Continuation
from serving.errors import BundleError
from serving.sampling import SamplingRows, choose
from serving.sampling.constraints import ConstraintError, choose_allowed


@dataclass(frozen=True)
class Sampled:
    """The next token of `owner`, or the error that prevents one."""

    owner: Continuation
    token: int
    logprobs: Logprobs | None = None
    error: str = ""
    by_request: bool = False
    """Whether the error is the sequence's own, and no failure of the model."""
    ended: bool = False
    """Whether the sequence was whole before, and has no next token."""


def sample(logits: FloatArray, owners: Sequence[Continuation | None]) -> list[Sampled]:
    """Sample every row of `logits` [rows, vocab] that has a sequence, as `serving.generation.generate` does.

    Bias and penalties are written into `logits`.
    """
    found, live = [], []
    for row, owner in enumerate(owners):
        if owner is None:
            continue
        sampled = None if owner.constraint is None else _sample_restricted(logits[row], owner)
        if sampled is None:
            live.append(row)
        else:
            found.append(sampled)
    if not live:
        return found
    raw = {row: _raw(logits[row], owners[row]) for row in live}
    for row in live:
        owner = owners[row]
        if owner is not None and owner.history is not None:
            owner.history.edits.apply_to(logits[row], 0)
    for row, (token, error) in zip(live, _choose(logits, owners, live), strict=True):
        owner, line = owners[row], raw[row]
        assert owner is not None
        wanted = owner.task.request.logprobs
        logprobs = None if line is None or wanted is None or error else log_probabilities(line, token, wanted)
        found.append(Sampled(owner, token, logprobs, error))
    return found


def _sample_restricted(line: FloatArray, owner: Continuation) -> Sampled | None:
    """The next token of a sequence whose grammar allows few.

    None where it allows many: then the others are at minus infinity in `line` [vocab], which is sampled as any row.
    """
    assert owner.constraint is not None
    owner.constraint.compute()
    if owner.constraint.done:
        return Sampled(owner, 0, ended=True)
    try:
        allowed = owner.constraint.allowed()
        if allowed.bias is not None:
            line += allowed.bias
            return None
        wanted = owner.task.request.logprobs
        raw = None if wanted is None else line[allowed.ids]
        if owner.history is not None:
            owner.history.edits.apply_to(line, 0)
        token = choose_allowed(line, allowed, owner.params, owner.seed, owner.made)
    except ConstraintError as error:
        return Sampled(owner, 0, error=str(error), by_request=True)
    except BundleError:
        return Sampled(owner, 0, error=_not_finite(owner))
    if raw is None or wanted is None:
        return Sampled(owner, token)
    ids = allowed.ids
    among = log_probabilities(raw, int(np.searchsorted(ids, token)), wanted)
    return Sampled(owner, token, Logprobs(among.own, tuple((int(ids[place]), nats) for place, nats in among.top)))


def _not_finite(owner: Continuation) -> str:
    place = len(owner.task.prompt) + owner.made
    return f"the model's greatest logit is not a finite number after {place} tokens; check the bundle"


def log_probabilities(line: FloatArray, token: int, count: int) -> Logprobs:
    """The log-softmax of `line` [vocab] at `token` and at its `count` greatest, the lowest id first among equals."""
    greatest = line.max()
    total = np.float64(greatest) + np.log(np.exp(line - greatest).sum(dtype=np.float64))
    count = min(count, len(line))
    top: tuple[tuple[int, float], ...] = ()
    if count:
        ids = np.flatnonzero(line >= np.partition(line, -count)[-count])
        ids = ids[np.lexsort((ids, -line[ids]))][:count]
        top = tuple(zip(ids.tolist(), (line[ids] - total).tolist(), strict=True))
    return Logprobs(float(line[token] - total), top, int(np.count_nonzero(line >= line[token])))


def _raw(line: FloatArray, owner: Continuation | None) -> FloatArray | None:
    """The model's own logits, if log-probabilities are wanted."""
    if owner is None or owner.task.request.logprobs is None:
        return None
    return line.copy() if owner.history is not None else line


def _choose(logits: FloatArray, owners: Sequence[Continuation | None], live: list[int]) -> list[tuple[int, str]]:
    """The token or the error of each row of `live`."""
    try:
        return [(token, "") for token in _tokens(logits, owners, live)]
    except BundleError:
        # One row has logits that are not finite. Find it, so that the others continue.
        if len(live) > 1:
            return [_choose(logits, owners, [row])[0] for row in live]
        owner = owners[live[0]]
        assert owner is not None
        return [(0, _not_finite(owner))]


def _tokens(logits: FloatArray, owners: Sequence[Continuation | None], live: list[int]) -> list[int]:
    each = [owner for row in live if (owner := owners[row]) is not None]
    # Without idle rows no copy is needed.
    rows = logits if len(live) == len(logits) else logits[live]
    tokens: list[int] = choose(
        rows,
        seed=np.array([one.seed for one in each], np.int64),
        step=np.array([one.made for one in each], np.int64),
        **SamplingRows.of([one.params for one in each]).arrays(),
    ).tolist()
    return tokens
