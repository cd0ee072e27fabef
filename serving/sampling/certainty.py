"""Whether a sampled token stays the same if every logit is off by a known tolerance.

Speculative decoding reads logits from a step over several tokens. Their last bits differ from those of single-token
steps. A token that is certain here is the one that single-token steps sample.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from serving.sampling.candidate_sampling import FEW_CANDIDATES, descending
from serving.sampling.parameters import SamplingParams
from serving.sampling.sampler import uniform

_SAMPLE = 4096
_ROUNDING = 1e-6


def logit_scale(line: NDArray[np.float32]) -> float:
    """The standard deviation of the finite logits of `line` [vocab], from some 4,096 of them, but at least 1.

    Rounding errors of logits grow with their spread. An offset that all of them share does not count.
    """
    some = line[:: max(1, len(line) // _SAMPLE)]
    some = some[np.isfinite(some)]
    return max(1.0, float(some.std(dtype=np.float64))) if len(some) else 1.0


def absolute_tolerance(line: NDArray[np.float32], params: SamplingParams, share: float) -> float:
    """The tolerance of `line` [vocab], with bias and penalties, if the model is off by `share` of `logit_scale`."""
    penalty = max(params.repetition_penalty, 1 / params.repetition_penalty)
    return share * penalty * logit_scale(line)


def is_far_ahead(line: NDArray[np.float32], token: int, params: SamplingParams, share: float) -> bool:
    """Whether greedy decoding surely samples `token`, by a bound on `absolute_tolerance` that is quick to compute.

    False says nothing. No standard deviation is above half the difference between the greatest and the least value.
    """
    if params.temperature != 0 and params.top_k != 1:
        return False
    best, least = line[token], line.min()
    rest = max(line[:token].max(initial=-np.inf), line[token + 1 :].max(initial=-np.inf))
    penalty = max(params.repetition_penalty, 1 / params.repetition_penalty)
    return bool(best - rest > 2 * share * penalty * max(1.0, 0.51 * (best - least)))


def is_certain(
    line: NDArray[np.float32], token: int, params: SamplingParams, seed: int, step: int, tolerance: float
) -> bool:
    """Whether `sample_tokens`, which gives `token`, gives it for all logits within `tolerance` of `line` [vocab].

    `line` has its bias and penalties. The answer may be False for a token that would stay the same: where the
    candidates do not decide it, and where a token of nearly the same logit could take its place in the order.

    With d = tolerance / temperature, weights relative to the greatest move by factors within exp(±2 d). Running sums
    and the kept mass do too, so the target is compared with sums widened by exp(±4 d).
    """
    if params.temperature == 0 or params.top_k == 1:
        rest = max(line[:token].max(initial=-np.inf), line[token + 1 :].max(initial=-np.inf))
        return bool(line[token] - rest > 2 * tolerance)
    # At least what float32 weights are off by themselves.
    spread = max(2 * tolerance / float(params.temperature), _ROUNDING)
    draw = float(uniform(seed, step))
    if params.top_p == 1 and params.min_p == 0 and not 0 < params.top_k < len(line):
        return _certain_among_all(line, token, float(params.temperature), draw, spread, tolerance)
    count = min(FEW_CANDIDATES, len(line))
    ids = descending(line, np.flatnonzero(line >= np.partition(line, -count)[-count]))
    logits = line[ids].astype(np.float64)
    temperature = float(params.temperature)
    limited = 0 < params.top_k < len(line)
    if limited and params.top_k > len(ids):
        return False
    with np.errstate(over="ignore", under="ignore"):
        weights = np.exp((logits[: params.top_k] if limited else logits) / temperature - logits[0] / temperature)
        mass = float(weights.sum())
        complete = limited or len(ids) == len(line)
        if not complete:
            mass = float(np.exp((line - line.max()) / params.temperature).sum(dtype=np.float64))
    sums = np.cumsum(weights)
    low = _kept(weights, sums, mass, params, -spread, complete)
    high = _kept(weights, sums, mass, params, spread, complete)
    if low is None or high is None:
        return False
    index, other = np.searchsorted(
        sums, (draw * low * np.exp(-2 * spread), draw * high * np.exp(2 * spread)), side="right"
    ).tolist()
    if index != other or index >= len(weights) - (not complete):
        return False
    around = logits[max(index - 1, 0) : index + 2]
    return bool((around[:-1] - around[1:] > 2 * tolerance).all())


def _certain_among_all(
    line: NDArray[np.float32], token: int, temperature: float, draw: float, spread: float, tolerance: float
) -> bool:
    """The same where every token is kept: without sorting, by the mass of the likelier tokens."""
    logit = line[token]
    if np.count_nonzero(line >= logit - 2 * tolerance) - np.count_nonzero(line > logit + 2 * tolerance) != 1:
        return False
    with np.errstate(over="ignore", under="ignore"):
        weights = np.exp((line - line.max()) / np.float32(temperature))
    target = draw * float(weights.sum(dtype=np.float64))
    before = float(weights[line > logit].sum(dtype=np.float64))
    after = before + float(weights[token])
    return bool(before <= target * np.exp(-2 * spread) and after > target * np.exp(2 * spread))


def _kept(
    weights: NDArray[np.float64],
    sums: NDArray[np.float64],
    mass: float,
    params: SamplingParams,
    spread: float,
    complete: bool,
) -> float | None:
    """The mass of the tokens that top-p and min-p keep, if borders move by exp(`spread`).

    None if that is after the candidates.
    """
    if params.top_p == 1 and params.min_p == 0:
        return mass
    border = float(params.top_p) * mass * np.exp(2 * spread)
    kept = 1 + int(np.searchsorted(sums[:-1], border, side="left"))
    kept = min(kept, max(1, int(np.count_nonzero(weights >= float(params.min_p) * np.exp(-spread)))))
    if kept == len(weights) and not complete:
        return None
    return float(sums[kept - 1])
