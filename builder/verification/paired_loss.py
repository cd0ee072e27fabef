"""How far two models' losses on the same tokens lie apart, and how certain that is for the number of tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BLOCK = 16
# Two-sided 95 % of a normal distribution.
_QUANTILE = 1.96


def perplexity_interval(differences: NDArray[Any]) -> tuple[float, float] | None:
    """Return the 95 % interval of the relative difference of two perplexities; None for fewer than 32 tokens.

    `differences` [tokens] holds one model's negative log-likelihood of each token minus the other's, in nats, in the
    order of the text. The mean's standard error is that of the means of 16 tokens each, as neighbors are not
    independent.
    """
    blocks = len(differences) // _BLOCK
    if blocks < 2:
        return None
    means = np.asarray(differences[: blocks * _BLOCK], np.float64).reshape(blocks, _BLOCK).mean(1)
    reach = _QUANTILE * float(means.std(ddof=1)) / math.sqrt(blocks)
    centre = float(np.asarray(differences, np.float64).mean())
    return math.expm1(centre - reach), math.expm1(centre + reach)


def relative_difference(figures: Mapping[str, Any], digits: int = 3) -> str:
    """Return `perplexity_relative` of `figures` in per cent, with `perplexity_relative_interval` if there is one."""
    relative, interval = figures["perplexity_relative"], figures["perplexity_relative_interval"]
    if interval is None:
        return f"{relative:+.{digits}%}"
    low, high = interval
    return f"{relative:+.{digits}%} (95 %: {low:+.{digits}%} to {high:+.{digits}%})"
