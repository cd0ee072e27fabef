"""Sampling of the next token from logits: greedy, or by temperature, top-k, top-p and min-p with a counted seed.

The same seed and step give the same random number in every runtime and every batch, because the number is a hash of
the two and not the state of a generator. Everything here is written so that the same steps can be taken in TensorFlow.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from serving.errors import BundleError
from serving.sampling.candidate_sampling import sample_row

_MASK = np.uint64(0xFFFFFFFF)
_GOLDEN = np.uint64(0x9E3779B9)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """lowbias32 on 32-bit values held in 64 bits (Chris Wellons, "Prospecting for Hash Functions", 2018)."""
    x = x ^ (x >> np.uint64(16))
    x = (x * np.uint64(0x7FEB352D)) & _MASK
    x = x ^ (x >> np.uint64(15))
    x = (x * np.uint64(0x846CA68B)) & _MASK
    return x ^ (x >> np.uint64(16))


def uniform(seed: ArrayLike, step: ArrayLike) -> NDArray[np.float32]:
    """A random number in [0, 1) for each seed and step (int64, broadcast together), float32 with 24 random bits.

    h = mix(low32(seed) ^ mix(high32(seed) ^ mix((step + 0x9E3779B9) mod 2^32))), result (h >> 8) * 2^-24, where mix is
    lowbias32. No intermediate reaches 2^64; in signed 64-bit arithmetic the products wrap, and their low 32 bits,
    which are all that is kept, are the same. Only the low 32 bits of `step` count.
    """
    seeds = np.asarray(seed, np.int64).astype(np.uint64)
    steps = np.asarray(step, np.int64).astype(np.uint64)
    inner = _mix(((steps & _MASK) + _GOLDEN) & _MASK)
    inner = _mix((seeds >> np.uint64(32)) ^ inner)
    mixed = _mix((seeds & _MASK) ^ inner)
    return (mixed >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24)


def sample_tokens(
    logits: NDArray[np.float32],
    temperature: ArrayLike,
    top_k: ArrayLike,
    top_p: ArrayLike,
    seed: ArrayLike,
    step: ArrayLike,
    min_p: ArrayLike = 0.0,
) -> NDArray[np.int64]:
    """Sample one token id for each row: `logits` is [rows, vocab] float32, the rest and the result are [rows].

    Temperature 0 takes the greatest logit, the lowest id among equals. Otherwise, in this order:

    1. x = logits sorted descending, the lowest id first among equals, the first `top_k` kept (0 keeps all);
    2. w = exp((x - x[0]) / temperature) in float32, so that no temperature overflows;
    3. c = running sum of w in float64, from left to right, mass = last of c;
    4. token i is kept if i = 0, or c[i - 1] < top_p * mass (Hugging Face's rule: the mass before it is below top_p)
       and w[i] >= min_p (w[0] is 1);
    5. the first i whose c[i] > uniform(seed, step) * (last kept c) is chosen.

    Bias and penalties come before all this (`serving.sampling.penalties`). A row's result is computed from that row
    alone.
    Raises BundleError if a row has no finite greatest logit.
    """
    rows = logits.shape[0]
    temperatures, top_ps, min_ps = (
        np.broadcast_to(np.asarray(each, np.float32), rows) for each in (temperature, top_p, min_p)
    )
    top_ks = np.broadcast_to(np.asarray(top_k, np.int64), rows)
    certain = (temperatures == 0) | (top_ks == 1)
    # Left out where nothing is drawn: greedy rows are otherwise chosen in half the time.
    draws = np.zeros(rows, np.float32) if certain.all() else np.broadcast_to(uniform(seed, step), rows)
    chosen = np.empty(rows, np.int64)
    for row in range(rows):
        line = logits[row]
        best = _greatest(line, row)
        if certain[row]:
            chosen[row] = best
        else:
            chosen[row] = sample_row(line, temperatures[row], int(top_ks[row]), top_ps[row], min_ps[row], draws[row])
    return chosen


def greedy_tokens(logits: NDArray[np.float32]) -> list[int]:
    """What `sample_tokens` gives where every row is greedy, in a fraction of the time."""
    return [_greatest(line, row) for row, line in enumerate(logits)]


def _greatest(line: NDArray[np.float32], row: int) -> int:
    best = int(line.argmax())
    if not math.isfinite(line[best]):
        raise BundleError(
            f"the model's greatest logit is {line[best]}, not a finite number, in row {row}; "
            "check the bundle with 'gpt2-bundle inspect'"
        )
    return best
