"""What is called equal, what is called slower, and where the warm-up ends."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from benchmarks.common.statistics import SAME, UNKNOWN, median_interval, noise, paired, unpaired, warm_from


def draws(count, factor=1.0, spread=0.02, seed=0):
    return (factor * np.exp(np.random.default_rng(seed).normal(0, spread, count))).tolist()


@pytest.mark.parametrize("compare", [paired, unpaired])
def test_the_same_is_equal_and_a_tenth_more_is_not(compare):
    trials = 200
    equal = [compare(draws(7, seed=seed), draws(7, seed=seed + 1000)).call for seed in range(trials)]
    slower = [compare(draws(7, 1.1, seed=seed), draws(7, seed=seed + 1000)).call for seed in range(trials)]
    assert equal.count(SAME) >= 0.97 * trials
    assert slower.count("higher") >= 0.97 * trials and "lower" not in slower


repeats_of_two = st.integers(1, 9).flatmap(
    lambda count: st.lists(
        st.tuples(st.floats(1e-3, 1e3, allow_nan=False), st.floats(1e-3, 1e3, allow_nan=False)),
        min_size=count,
        max_size=count,
    )
)
MIRRORED = {"higher": "lower", "lower": "higher", SAME: SAME, UNKNOWN: UNKNOWN}


@given(repeats_of_two, st.floats(1e-3, 1e3))
@settings(max_examples=60, deadline=None)
def test_a_verdict_knows_neither_unit_nor_side(pairs, unit):
    ours, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
    verdict, mirrored = paired(ours, theirs), paired(theirs, ours)
    scaled = paired([value * unit for value in ours], [value * unit for value in theirs])
    least = math.log1p(max(0.01, verdict.noise or 0.0))
    assume(not math.isclose(abs(math.log(verdict.ratio)), least, rel_tol=1e-6))
    assert mirrored.call == MIRRORED[verdict.call]
    assert (mirrored.ratio, mirrored.low, mirrored.high) == pytest.approx(
        (1 / verdict.ratio, 1 / verdict.high, 1 / verdict.low)
    )
    assert scaled.ratio == pytest.approx(verdict.ratio) and scaled.pairs == len(pairs)
    assert verdict.low <= verdict.ratio * (1 + 1e-9) and verdict.ratio <= verdict.high * (1 + 1e-9)
    for compare in (paired, unpaired):
        assert compare(ours, ours).call in (SAME, UNKNOWN) and compare(ours, ours).ratio == 1


def test_drift_that_hits_both_of_a_pair_hides_nothing():
    drift = np.linspace(1, 3, 7)
    ours, theirs = np.array(draws(7, 1.1, 0.01)) * drift, np.array(draws(7, 1.0, 0.01, 1)) * drift
    assert paired(ours.tolist(), theirs.tolist()).call == "higher"
    assert unpaired(ours.tolist(), theirs.tolist()).call == SAME


def test_inside_the_noise_no_winner_is_named():
    assert paired(draws(7, 1.1, 0.3), draws(7, 1.0, 0.3, 1)).call == SAME
    assert paired([1.005] * 7, [1.0] * 7).call == SAME
    assert paired([1.02] * 7, [1.0] * 7).call == "higher"


def test_too_few_repeats_say_nothing():
    verdict = paired([2.0] * 4, [1.0] * 4)
    assert (verdict.call, verdict.ratio, verdict.pairs) == (UNKNOWN, 2.0, 4)
    assert paired([], []).ratio is None
    for verdict in (unpaired([], [1.0]), unpaired([1.0], [])):
        assert (verdict.call, verdict.ratio) == (UNKNOWN, None)


def test_the_interval_of_a_median_holds_it_as_often_as_it_says():
    assert median_interval([3, 1, 2, 5, 4]) == (1, 5)
    assert median_interval(range(10)) == (1, 8)  # 1 - 2 * 11 / 1024 = 97.9 %; (2, 7) would hold it in 89.1 %
    random = np.random.default_rng(0)
    held = [low <= 0 <= high for low, high in (median_interval(random.normal(size=9)) for _ in range(2000))]
    assert np.mean(held) == pytest.approx(1 - 2 * (1 + 9) / 512, abs=0.015)


def test_noise_is_the_spread_between_two_medians():
    spread = 0.03
    found = np.median([noise([draws(9, spread=spread, seed=seed)]) for seed in range(200)])
    assert found == pytest.approx(math.expm1(1.96 * math.sqrt(2) * 1.2533 * spread / 3), rel=0.25)
    assert noise([[1.0]]) is None and noise([]) is None
    assert noise([[1.0, 1.0, 1.0]]) == 0
    # Of an odd series the middle one is left out, of an even one none is.
    odd, even = [math.log(1.1), math.log(1.3 / 1.1)], [math.log(2) / 2] * 2
    for series, deviations in (([1.0, 1.3, 1.1], odd), ([1.0, 2.0], even)):
        spread = 1.4826 * np.median(deviations) / math.sqrt(len(series))
        assert noise([series]) == pytest.approx(math.expm1(1.96 * math.sqrt(2) * 1.2533 * spread))


def test_warm_up_is_cut_where_it_ends():
    random = np.random.default_rng(0)
    steady = 1 + 0.01 * random.normal(size=60)
    assert warm_from([1.0] * 19) is None and warm_from([1.0] * 20) == 0
    assert warm_from(steady) is not None
    slow = np.concatenate([np.linspace(5, 1.5, 12), steady])
    # It may cut more than the slow start, never less.
    assert warm_from(slow) >= 10 and np.mean(slow[warm_from(slow) :]) == pytest.approx(1, abs=0.01)
    assert warm_from(np.linspace(5, 1, 40)) is None


def run_of(repeats, machine, random, factor=1.0):
    """Median and 99th percentile of each repeat: 300 gaps of 15 % spread, 3 in 100 stalled up to tenfold, times what
    the machine is worth now.
    """
    found = []
    for speed in machine[:repeats]:
        gaps = factor * speed * np.exp(random.normal(0, 0.15, 300))
        gaps *= np.where(random.random(300) < 0.03, random.uniform(1, 10, 300), 1.0)
        found.append(np.quantile(gaps, (0.5, 0.99)))
    return np.array(found).T.tolist()


def drifting(count, random, spread=0.05):
    """A machine whose speed wanders: each repeat keeps 0.7 of the last one's deviation (an AR(1) process)."""
    state = [random.normal(0, spread)]
    for _ in range(count - 1):
        state.append(0.7 * state[-1] + math.sqrt(1 - 0.7**2) * random.normal(0, spread))
    return np.exp(state)


@pytest.mark.parametrize("repeats", [5, 9])
@pytest.mark.parametrize(("place", "found_at_least"), [(0, 0.97), (1, 0.0)], ids=["p50", "p99"])
def test_stalls_and_a_wandering_machine_fool_nobody(repeats, place, found_at_least):
    """Turns within a repeat share the machine's mood. The 99th percentile is the stalls' and may stay undecided."""
    trials, equal, slower = 150, [], []
    for seed in range(trials):
        random = np.random.default_rng(seed)
        machine = drifting(repeats, random)
        runs = [run_of(repeats, machine, random, factor)[place] for factor in (1.0, 1.0, 1.1)]
        equal.append(paired(runs[1], runs[0]).call)
        slower.append(paired(runs[2], runs[0]).call)
    assert equal.count(SAME) >= 0.95 * trials
    assert slower.count("higher") >= found_at_least * trials
    assert slower.count("lower") <= 0.02 * trials


@pytest.mark.parametrize("repeats", [5, 9])
def test_two_records_of_a_steady_machine_are_told_apart_by_a_tenth_alone(repeats):
    trials, equal, slower = 150, [], []
    for seed in range(trials):
        random = np.random.default_rng(seed)
        before, again, later = (np.exp(random.normal(0, 0.01, repeats)) for _ in range(3))
        first = run_of(repeats, before, random)[0]
        equal.append(unpaired(run_of(repeats, again, random)[0], first).call)
        slower.append(unpaired(run_of(repeats, later, random, 1.1)[0], first).call)
    assert equal.count(SAME) >= 0.95 * trials
    assert slower.count("higher") >= 0.97 * trials


def test_a_machine_that_wanders_by_some_percent_between_runs_is_no_change():
    steady = [99.5, 100.0, 100.2, 99.8, 100.1, 100.3, 99.9]
    assert unpaired([1.04 * value for value in steady], steady).call == SAME
    assert paired([1.04 * value for value in steady], steady).call == "higher"
    assert unpaired([1.1 * value for value in steady], steady).call == "higher"
    # A twentieth of the intervals of 95 % leave out 1 by chance, and records have dozens.
    before = [3.31, 3.53, 3.45, 3.52, 4.03, 3.72, 3.92]
    after = [4.20, 3.83, 4.12, 4.99, 15.8, 4.54, 3.68]
    found = unpaired(after, before)
    assert found.low > 1 and found.call == SAME
