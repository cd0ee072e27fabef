"""Medians and their uncertainty, when a target is warm, and whether two differ: no distribution is assumed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

FEWEST_REPEATS = 5
"""Below five pairs no percentile interval of their median reaches 93 %, so nothing is said."""
SMALLEST = 0.01
"""A difference under 1 % is not named whatever the interval says."""
BETWEEN_RUNS = 0.05
"""And one under 5 % is not between two runs: the machine itself is by some per cent another, which no repeat shows."""
SAME, UNKNOWN = "not distinguishable", "too few repeats"
"""What a verdict says instead of "higher" or "lower"; two runtimes are never called equal."""
_BATCH = 5


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


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    """The 50th and 99th percentile and the maximum of `samples`."""
    return {name: float(np.percentile(samples, share)) for name, share in (("p50", 50), ("p99", 99), ("max", 100))}


@dataclass(frozen=True)
class Verdict:
    """What the repeats say of one figure of a contender compared with that of a reference.

    `ratio` is contender over reference with its 95 % interval; `noise` is the relative difference that repeats of one
    and the same show by themselves. `call` is higher, lower, `SAME` within the noise, or `UNKNOWN`.
    """

    call: str
    ratio: float | None
    low: float | None
    high: float | None
    noise: float | None
    pairs: int


def warm_from(values: Sequence[float]) -> int | None:
    """How many values at the start are warm-up by MSER-5, or None while that cannot be said.

    Means of five are cut where the squared error of the rest's mean is least, in the first half only, since a few means
    at the end agree by chance (White 1997; White, Cobb and Spratt 2000). None where the middle itself is the best cut,
    which may mean that the run is still warming up, and for under 20 values.
    """
    whole = len(values) // _BATCH * _BATCH
    means = np.asarray(values[:whole], np.float64).reshape(-1, _BATCH).mean(axis=1)
    if len(means) < 4:
        return None
    middle = len(means) // 2
    errors = [float(np.var(means[cut:]) / len(means[cut:])) for cut in range(middle + 1)]
    cut = int(np.argmin(errors))
    return None if cut == middle else cut * _BATCH


def noise(series: Sequence[Sequence[float]]) -> float | None:
    """Relative difference, at 95 %, between medians of repeats of one and the same; None without two repeats.

    Each series is one target's figure, repeat by repeat. Their logarithms' spread about each series' own median is
    pooled as a scaled median absolute deviation; a median of n normal values has 1.2533 / sqrt(n) of their spread, and
    two such medians sqrt(2) of that.
    """
    usable = [np.log(np.asarray(values, np.float64)) for values in series if len(values) > 1 and min(values) > 0]
    if not usable:
        return None
    deviations = np.concatenate([np.abs(values - np.median(values)) for values in usable])
    # The median of an odd number of values is one of them, whose own deviation of zero says nothing.
    zeros = sum(len(values) % 2 for values in usable)
    kept = np.sort(deviations)[zeros:]
    spread = 1.4826 * float(np.median(kept)) if len(kept) else 0.0
    repeats = min(len(values) for values in usable)
    return math.expm1(1.96 * math.sqrt(2) * 1.2533 * spread / math.sqrt(repeats))


def paired(contender: Sequence[float], reference: Sequence[float], smallest: float = SMALLEST) -> Verdict:
    """Compare two figures whose repeats took turns: the median of the ratios of each pair, with its interval.

    A difference is named only if the interval of the ratio leaves out 1 and the ratio is further from 1 than both the
    noise of the ratios and `smallest`.
    """
    pairs = [(one, other) for one, other in zip(contender, reference, strict=True) if one > 0 and other > 0]
    if not pairs:
        return Verdict(UNKNOWN, None, None, None, None, 0)
    logs = np.log([one / other for one, other in pairs])
    low, high = median_interval(logs.tolist())
    # What hits both of a pair cancels in its ratio, so the ratios' own spread is the noise.
    found = noise([np.exp(logs).tolist()])
    found = found / math.sqrt(2) if found is not None else None
    return _verdict(float(np.median(logs)), low, high, found, len(pairs), smallest)


def unpaired(
    contender: Sequence[float], reference: Sequence[float], smallest: float = BETWEEN_RUNS, resamples: int = 2000
) -> Verdict:
    """Compare repeats that were taken at different times: the ratio of medians, both sides resampled on their own.

    The interval given is of 95 %, but a difference is named only where that of 99 % leaves out 1, as two records have
    dozens of figures to be wrong about.
    """
    ours, theirs = ([value for value in values if value > 0] for values in (contender, reference))
    if not ours or not theirs:
        return Verdict(UNKNOWN, None, None, None, None, 0)
    random = np.random.default_rng(0)
    sides = []
    for values in (np.log(ours), np.log(theirs)):
        sides.append(np.median(values[random.integers(0, len(values), (resamples, len(values)))], axis=1))
    low, high, least, most = (float(each) for each in np.percentile(sides[0] - sides[1], [2.5, 97.5, 0.5, 99.5]))
    ratio = float(np.median(np.log(ours)) - np.median(np.log(theirs)))
    found = _verdict(ratio, low, high, noise([ours, theirs]), min(len(ours), len(theirs)), smallest)
    return replace(found, call=SAME) if least <= 0 <= most and found.call != UNKNOWN else found


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The narrowest pair of order statistics that holds the median in 95 of 100 cases, whatever the distribution.

    By the sign test (David and Nagaraja, Order Statistics, 7.1); least and greatest where even those do not reach
    95 %, as with five values, whose range holds it in 93.75 %.
    """
    ordered = sorted(values)
    count = len(ordered)
    cut, below = 0, 0.5**count
    while cut + 1 < count - cut - 1:
        below_next = below + math.comb(count, cut + 1) * 0.5**count
        if 1 - 2 * below_next < 0.95:
            break
        cut, below = cut + 1, below_next
    return float(ordered[cut]), float(ordered[count - 1 - cut])


def _verdict(ratio: float, low: float, high: float, found: float | None, pairs: int, smallest: float) -> Verdict:
    call: str = SAME
    if pairs < FEWEST_REPEATS:
        call = UNKNOWN
    elif abs(ratio) > math.log1p(max(smallest, found or 0.0)):
        call = "higher" if low > 0 else "lower" if high < 0 else SAME
    return Verdict(call, math.exp(ratio), math.exp(low), math.exp(high), found, pairs)
