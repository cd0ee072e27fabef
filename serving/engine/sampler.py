"""Sampling of the next token of every row, with the log-probabilities that requests want."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from serving.backends.base import FloatArray
from serving.engine.api import Logprobs
from serving.engine.requests import EngineSequence
from serving.errors import BundleError
from serving.sampling import SamplingRows, sample_tokens
from serving.sampling.constraints import ConstraintError, sample_allowed
from serving.sampling.sampler import greedy_tokens


@dataclass(frozen=True)
class Sampled:
    """The next token of `sequence`, or the error that prevents one."""

    sequence: EngineSequence
    token: int
    logprobs: Logprobs | None = None
    error: str = ""
    by_request: bool = False
    """Whether the error is the sequence's own, and no failure of the model."""
    ended: bool = False
    """Whether the sequence was whole before, and has no next token."""


def sample(logits: FloatArray, sequences: Sequence[EngineSequence | None]) -> list[Sampled]:
    """Sample every row of `logits` [rows, vocab] that has a sequence, as `serving.generation.generate` does.

    Bias and penalties are written into `logits`.
    """
    found, live = [], []
    for row, sequence in enumerate(sequences):
        if sequence is None:
            continue
        sampled = None if sequence.constraint is None else _sample_restricted(logits[row], sequence)
        if sampled is None:
            live.append(row)
        else:
            found.append(sampled)
    if not live:
        return found
    raw = {row: _raw(logits[row], sequences[row]) for row in live}
    for row in live:
        sequence = sequences[row]
        if sequence is not None and sequence.penalty_state is not None:
            sequence.penalty_state.logits_processor.apply_to(logits[row], 0)
    for row, (token, error) in zip(live, _sample_rows(logits, sequences, live), strict=True):
        sequence, line = sequences[row], raw[row]
        assert sequence is not None
        wanted = sequence.request.submitted.logprobs
        logprobs = None if line is None or wanted is None or error else log_probabilities(line, token, wanted)
        found.append(Sampled(sequence, token, logprobs, error))
    return found


def _sample_restricted(line: FloatArray, sequence: EngineSequence) -> Sampled | None:
    """The next token of a sequence whose grammar allows few.

    None where it allows many: then the others are at minus infinity in `line` [vocab], which is sampled as any row.
    """
    assert sequence.constraint is not None
    sequence.constraint.compute()
    if sequence.constraint.done:
        return Sampled(sequence, 0, ended=True)
    try:
        allowed = sequence.constraint.allowed()
        if allowed.bias is not None:
            line += allowed.bias
            return None
        wanted = sequence.request.submitted.logprobs
        raw = None if wanted is None else line[allowed.ids]
        if sequence.penalty_state is not None:
            sequence.penalty_state.logits_processor.apply_to(line, 0)
        token = sample_allowed(line, allowed, sequence.params, sequence.seed, sequence.num_generated)
    except ConstraintError as error:
        return Sampled(sequence, 0, error=str(error), by_request=True)
    except BundleError:
        return Sampled(sequence, 0, error=_not_finite(sequence))
    if raw is None or wanted is None:
        return Sampled(sequence, token)
    ids = allowed.ids
    among = log_probabilities(raw, int(np.searchsorted(ids, token)), wanted)
    return Sampled(sequence, token, Logprobs(among.own, tuple((int(ids[place]), nats) for place, nats in among.top)))


def _not_finite(sequence: EngineSequence) -> str:
    place = len(sequence.request.prompt) + sequence.num_generated
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


def _raw(line: FloatArray, sequence: EngineSequence | None) -> FloatArray | None:
    """The model's own logits, if log-probabilities are wanted."""
    if sequence is None or sequence.request.submitted.logprobs is None:
        return None
    return line.copy() if sequence.penalty_state is not None else line


def _sample_rows(
    logits: FloatArray, sequences: Sequence[EngineSequence | None], live: list[int]
) -> list[tuple[int, str]]:
    """The token or the error of each row of `live`."""
    try:
        return [(token, "") for token in _tokens(logits, sequences, live)]
    except BundleError:
        # One row has logits that are not finite. Find it, so that the others continue.
        if len(live) > 1:
            return [_sample_rows(logits, sequences, [row])[0] for row in live]
        sequence = sequences[live[0]]
        assert sequence is not None
        return [(0, _not_finite(sequence))]


def _tokens(logits: FloatArray, sequences: Sequence[EngineSequence | None], live: list[int]) -> list[int]:
    each = [sequence for row in live if (sequence := sequences[row]) is not None]
    # Without idle rows no copy is needed.
    rows = logits if len(live) == len(logits) else logits[live]
    if all(one.params.temperature == 0 or one.params.top_k == 1 for one in each):
        return greedy_tokens(rows)
    tokens: list[int] = sample_tokens(
        rows,
        seed=np.array([one.seed for one in each], np.int64),
        step=np.array([one.num_generated for one in each], np.int64),
        **SamplingRows.of([one.params for one in each]).arrays(),
    ).tolist()
    return tokens
