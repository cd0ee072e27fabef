"""Schedules: drawn as stated, and the same from the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.suite.load.schedule import Lengths, Planner
from serving.errors import InputError

TEXT = list(range(100))
FIXED = Lengths(4, 4)


def planner(seed=0):
    return Planner(TEXT, 48, seed)


def test_the_same_seed_gives_the_same_bytes_and_another_one_others():
    one, same, other = (planner(seed).server(20, Lengths(2, 9, "uniform"), FIXED, rate=5) for seed in (1, 1, 2))
    assert one.to_lines() == same.to_lines() and one.sha256 == same.sha256
    assert one.sha256 != other.sha256


def test_prompts_are_runs_of_the_text_taken_as_a_ring():
    for request in planner().offline(50, Lengths(1, 12, "uniform"), FIXED).requests:
        assert list(request.prompt) == [(request.prompt[0] + place) % 100 for place in range(len(request.prompt))]
        assert request.at == 0.0


@pytest.mark.parametrize(("arrivals", "variation"), [("poisson", 1.0), ("gamma", 2.0), ("constant", 0.0)])
def test_arrivals_have_the_rate_and_the_variation_that_they_state(arrivals, variation):
    schedule = planner().server(20_000, FIXED, FIXED, rate=8, arrivals=arrivals)
    gaps = np.diff([request.at for request in schedule.requests])
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.06, abs=1e-9)


def test_a_trace_is_replayed_from_its_first_time():
    schedule = planner().trace([10.5, 10.0, 12.0], FIXED, FIXED)
    assert [request.at for request in schedule.requests] == [0.0, 0.5, 2.0] and schedule.concurrency is None


@given(st.integers(1, 30), st.integers(0, 30), st.sampled_from(["uniform", "log-uniform"]), st.integers(0, 5))
def test_lengths_stay_within_their_bounds(low, more, distribution, seed):
    drawn = Lengths(low, low + more, distribution).draw(50, np.random.default_rng(seed))
    assert len(drawn) == 50 and low <= min(drawn) <= max(drawn) <= low + more


def test_log_uniform_lengths_halve_where_their_logarithm_does():
    drawn = np.array(Lengths(1, 99, "log-uniform").draw(20_000, np.random.default_rng(0)))
    assert np.mean(drawn < 10) == pytest.approx(0.5, abs=0.02)


def test_lengths_are_read_as_they_are_written():
    assert Lengths.parse("64") == Lengths(64, 64)
    assert Lengths.parse("16-128") == Lengths(16, 128, "uniform")
    assert Lengths.parse("log:16-128") == Lengths(16, 128, "log-uniform")
    for wrong in ("", "a", "0", "9-8", "log:5", "lin:1-2", "1-", "-3"):
        with pytest.raises(InputError, match="length"):
            Lengths.parse(wrong)


def test_a_varied_schedule_has_other_first_tokens_that_the_model_knows():
    drawn = planner().server(5, FIXED, FIXED, rate=2)
    assert drawn.varied(0) is drawn
    known = {token for request in drawn.requests for token in request.prompt}
    seen = {tuple(request.prompt for request in drawn.varied(number).requests) for number in range(len(known))}
    assert len(seen) == len(known)
    again = drawn.varied(3)
    assert again == drawn.varied(3) and again.settings == drawn.settings
    for one, other in zip(drawn.requests, again.requests, strict=True):
        assert (one.prompt[1:], one.at, one.new_tokens) == (other.prompt[1:], other.at, other.new_tokens)
        assert one.prompt[0] != other.prompt[0] and other.prompt[0] in known


@pytest.mark.parametrize("arrivals", ["poisson", "gamma", "constant"])
def test_the_requests_of_a_sweep_come_at_its_rates(arrivals):
    made = planner().saturation(FIXED, FIXED, start=2, factor=2, seconds=20, rates=3, arrivals=arrivals)
    assert [len(each.requests) for each in made] == [40, 80, 160]
    for each, rate in zip(made, (2, 4, 8), strict=True):
        assert each.requests[0].at == 0
        assert each.requests[-1].at == pytest.approx((len(each.requests) - 1) / rate)


def test_what_cannot_be_drawn_is_refused():
    assert planner().single(1, Lengths(40, 40), Lengths(8, 8)).requests
    with pytest.raises(InputError, match="context of 48"):
        planner().single(1, Lengths(40, 40), Lengths(9, 9))
    with pytest.raises(InputError, match="rate"):
        planner().server(1, FIXED, FIXED, rate=0)
    for wrong in ({"start": 0}, {"factor": 1}, {"seconds": 0}, {"factor": 1e200}):
        with pytest.raises(InputError, match="a sweep"):
            planner().saturation(FIXED, FIXED, **{"start": 1, "factor": 2, "seconds": 1, "rates": 9} | wrong)
    with pytest.raises(InputError, match="poisson"):
        planner().server(1, FIXED, FIXED, rate=1, arrivals="poison")
