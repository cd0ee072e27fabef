"""Medians and their uncertainty, without assuming any distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Summary:
    """A median with its 95 % bootstrap interval, in the unit of the samples, and how many there were."""

    median: float
    low: float
    high: float
    samples: int


def summarise(samples: Sequence[float], resamples: int = 1000, seed: int = 0) -> Summary | None:
    """Median of `samples` with a percentile bootstrap interval (Efron 1979), or None if there are none."""
    if len(samples) == 0:
        return None
    values = np.asarray(samples, np.float64)
    random = np.random.default_rng(seed)
    medians = np.median(values[random.integers(0, len(values), (resamples, len(values)))], axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return Summary(float(np.median(values)), float(low), float(high), len(values))
