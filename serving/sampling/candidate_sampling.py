"""Sampling of one token from the top candidates of a row, as `serving.sampling.sample_tokens` defines it.

A row of GPT-2 has 50,257 logits, and sorting them takes as long as a decode step. The sampled token nearly always is
among the top candidates, and sums that need no sorting prove whether it is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FEW_CANDIDATES = 1024
"""Number of top candidates that are tried before the whole vocabulary is sorted."""
# Sums of the same weights in any two orders differ by less: by 2^-53 for each term, up to four million of them.
_ROUNDING = 2.0**-30
_LOW = np.uint64(0xFFFFFFFF)


def sample_row(
    line: NDArray[np.float32],
    temperature: np.float32,
    top_k: int,
    top_p: np.float32,
    min_p: np.float32,
    random_number: np.float32,
) -> int:
    """The token of `line` [vocab] that `random_number` in [0, 1) selects, at a temperature above 0."""
    if 0 < top_k < len(line):
        ids = _top_candidates(line, top_k)[:top_k]
        return _sample(ids, _weights(line[ids], temperature), top_p, min_p, random_number)
    weights = _weights(line, temperature)
    if len(line) > FEW_CANDIDATES:
        ids = _top_candidates(line, FEW_CANDIDATES)
        index = _certain(weights, np.cumsum(weights[ids], dtype=np.float64), top_p, min_p, random_number)
        if index is not None:
            return int(ids[index])
    ids = descending(line, np.arange(len(line)))
    return _sample(ids, weights[ids], top_p, min_p, random_number)


def descending(line: NDArray[np.float32], ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """`ids` ordered by their logit in `line`, greatest first, the lowest id first among equals.

    Sorts one unique 64-bit key an id, the logit above and the id below: several times faster than a stable argsort.
    """
    # Subtracting from 0 turns the order round and leaves no -0.0, whose bits would differ from those of its equal.
    bits = (np.float32(0) - line[ids]).view(np.uint32)
    # IEEE 754 bits order as integers once negative numbers are inverted and the others get the top bit.
    signs = (bits.view(np.int32) >> 31).view(np.uint32)
    bits ^= signs | np.uint32(0x80000000)
    keys = bits.astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= ids.view(np.uint64)
    keys.sort()
    keys &= _LOW
    return keys.view(np.int64)


def _top_candidates(line: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Every id whose logit is not below the `count`-th greatest, in the order of `descending`."""
    return descending(line, np.flatnonzero(line >= np.partition(line, -count)[-count]))


def _weights(line: NDArray[np.float32], temperature: np.float32) -> NDArray[np.float32]:
    with np.errstate(over="ignore", under="ignore"):
        weights: NDArray[np.float32] = np.exp((line - line.max()) / temperature)
    return weights


def _sample(
    ids: NDArray[np.int64],
    weights: NDArray[np.float32],
    top_p: np.float32,
    min_p: np.float32,
    random_number: np.float32,
) -> int:
    """Steps 3 to 5 of `choose` on sorted `ids` and their weights."""
    # In float32, what is added at the end of a large vocabulary would be lost in rounding.
    cumulative = np.cumsum(weights, dtype=np.float64)
    kept = 1 + int(np.searchsorted(cumulative[:-1], np.float64(top_p) * cumulative[-1], side="left"))
    kept = min(kept, int(np.count_nonzero(weights >= min_p)))
    target = np.float64(random_number) * cumulative[kept - 1]
    index = int(np.searchsorted(cumulative[:kept], target, side="right"))
    # The draw is below 1 and so is its product with the mass, in every rounding; the bound costs nothing.
    return int(ids[min(index, kept - 1)])


def _certain(
    weights: NDArray[np.float32],
    cumulative: NDArray[np.float64],
    top_p: np.float32,
    min_p: np.float32,
    random_number: np.float32,
) -> int | None:
    """Where `_sample` of the whole vocabulary would end, if that is certain and among the likeliest.

    `weights` [vocab] are in order of id, `cumulative` is the running sum of the likeliest. The mass that is drawn from
    ends where the nucleus does or where min_p does, whichever comes first, and is known within bounds: the last
    token of a nucleus that goes on behind the likeliest weighs no more than the last of those.
    """
    mass = weights.sum(dtype=np.float64)
    border = np.float64(top_p) * mass
    end = weights[weights >= min_p].sum(dtype=np.float64) if min_p > 0 else mass
    last = cumulative[-1] - cumulative[-2]
    low, high = border * (1 - _ROUNDING), border * (1 + _ROUNDING)
    first, after = np.searchsorted(cumulative, (low, high)).tolist()
    least = cumulative[first] if first < len(cumulative) else low
    most = cumulative[after] if after < len(cumulative) else high + last
    target = np.float64(random_number)
    ends = (
        target * min(least, end) * (1 - _ROUNDING),
        target * min(most, end) * (1 + _ROUNDING),
    )
    index, other = np.searchsorted(cumulative, ends, side="right").tolist()
    return int(index) if index == other < len(cumulative) else None
