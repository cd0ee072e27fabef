"""The rate sweep in virtual time, against servers whose capacity is known; and what a rate is judged by."""

from __future__ import annotations

import asyncio
import json

import pytest

from benchmarks.suite.figures.latency_metrics import Objectives
from benchmarks.suite.load.events import Response
from benchmarks.suite.load.schedule import Lengths, Planner
from benchmarks.suite.rate_sweep import Pace, Standing, best, pace
from benchmarks.suite.regression_gate import BudgetError, check_budgets
from benchmarks.suite.report.markdown import to_markdown
from benchmarks.suite.report.tables import to_csv
from benchmarks.suite.resume import SUSTAINED
from benchmarks.suite.run import measure
from benchmarks.suite.targets.base import Completion, TargetError
from serving.errors import InputError
from tests.benchmarks.suite.virtual_clock import LoopClock, run_virtual

CLOCK = LoopClock()
LENGTHS = Lengths(4, 4), Lengths(5, 5)


class Queue:
    """Serves one request at a time, in `seconds` each: 1 / seconds is its capacity. `log` is what it was asked."""

    label, precision, emulator = "queue", None, True

    def __init__(self, name, seconds, refuses=False):
        self.name, self.seconds, self.refuses, self.log = name, seconds, refuses, []

    async def start(self):
        self.free = asyncio.Semaphore(1)

    async def stop(self):
        pass

    def pid(self):
        return None

    async def send(self, request):
        self.log.append(request.prompt)
        if self.refuses:
            raise TargetError("no")
        async with self.free:
            started = CLOCK.now()
            times = []
            for _ in range(request.new_tokens):
                await asyncio.sleep(self.seconds / request.new_tokens)
                times.append(CLOCK.now())
        return Completion(tuple(times), times[-1], started=started, tokens=(1,) * request.new_tokens)


def rates(arrivals="constant", **settings):
    settings = {"start": 1, "factor": 2**0.5, "seconds": 4.0, "rates": 12} | settings
    return Planner(range(50), 48).saturation(*LENGTHS, arrivals=arrivals, **settings)


def swept(*targets, schedules=None, seconds=1e6, **limits):
    objectives = Objectives(**limits)
    work = measure(
        list(targets), schedules or rates(), CLOCK, repeats=1, objectives=objectives, sweep_seconds=seconds, timeout=1e3
    )
    record = run_virtual(work)
    json.dumps(record, allow_nan=False)
    return record, {row["target"]: row["sweep"] for row in record["points"][-1]["rows"]}


@pytest.mark.parametrize("arrivals", ["constant", "poisson"])
def test_the_highest_rate_below_the_capacity_is_found(arrivals):
    """Capacities 10 and 3 lie between rates of the sweep: 8 and 11.3, 2.8 and 4."""
    seconds = {"constant": 4.0, "poisson": 40.0}[arrivals]
    record, found = swept(Queue("a", 0.1), Queue("b", 1 / 3), schedules=rates(arrivals, seconds=seconds))
    for name, below, above in (("a", 8, 8 * 2**0.5), ("b", 2 * 2**0.5, 4)):
        assert found[name]["sustained"] == pytest.approx(below)
        assert found[name]["failed_at"] == pytest.approx(above)
        assert "of the rate" in found[name]["why"]
    result = record["points"][-1]
    assert result["winners"] == {SUSTAINED: "a"}
    assert [row["figures"][SUSTAINED] for row in result["rows"]] == [
        [found["a"]["sustained"]],
        [found["b"]["sustained"]],
    ]
    # Two rates beyond what it sustains, each is out; so the curve shows what overload does.
    there = [{row["target"] for row in point["rows"]} for point in record["points"][:-1]]
    assert there == [{"a", "b"}] * 6 + [{"a"}] * 3
    text = to_markdown(record)
    assert text.count("### Highest rate sustained") == 1 and "| a (emulator) | **8.00** | 11.3 |" in text
    assert "highest rate sustained,a,True,sustained_requests_per_second,0,8" in to_csv(record)


def test_a_budget_may_be_a_sustained_rate():
    record, _ = swept(Queue("a", 0.1), Queue("b", 0.1, refuses=True))
    made = json.loads(json.dumps(record))
    with pytest.raises(BudgetError, match=r"^b .emulator., highest rate sustained: no sustained_req\w+$"):
        check_budgets(made, ["sustained_requests_per_second>=5"])
    made["points"][-1]["rows"].pop()
    assert check_budgets(made, ["sustained_requests_per_second>=5"]) == [
        "a (emulator), highest rate sustained: sustained_requests_per_second is 8.000, the budget >=5"
    ]


def test_goodput_ends_a_sweep_too():
    """Poisson arrivals wait at 80 % of the capacity; a limit of twice the service is passed by many."""
    schedules = rates("poisson", seconds=40.0)
    _, free = swept(Queue("a", 0.1), schedules=schedules)
    _, bound = swept(Queue("a", 0.1), schedules=schedules, e2e=0.2)
    assert bound["a"]["sustained"] < free["a"]["sustained"]
    assert "met the objectives" in bound["a"]["why"]


def test_time_and_failures_end_a_sweep():
    record, found = swept(Queue("a", 0.001), Queue("b", 0.1, refuses=True), seconds=30.0)
    assert found["b"] == {"sustained": None, "failed_at": pytest.approx(1), "why": "16 of 16 requests failed"}
    assert found["a"]["sustained"] is not None and found["a"]["failed_at"] is None
    assert len(record["points"]) - 1 < 12 and "not seen to fail" in to_markdown(record)


def test_a_rate_is_what_it_says_and_played_alike(tmp_path):
    for schedule in rates("gamma", seconds=8.0):
        timestamps = [request.at for request in schedule.requests]
        assert (len(timestamps) - 1) / (timestamps[-1] - timestamps[0]) == pytest.approx(schedule.settings["rate"])
    with pytest.raises(InputError, match="its factor is above 1"):
        rates(factor=1.0)


def test_one_failed_rate_is_forgiven():
    kept, failed = Pace(1, 1, 1, True, None), Pace(2, 1, 1, False, "slow")
    standing = Standing([kept, failed, Pace(4, 4, 1, True, None)])
    assert not standing.is_out and standing.summary() == {"sustained": 4, "failed_at": None, "why": None}
    assert Standing([kept, failed, failed]).is_out


def test_neighbouring_rates_have_no_winner():
    ours = {"sustained": 4.0, "failed_at": 8.0}
    assert best({"a": ours, "b": {"sustained": 2.0, "failed_at": 4.0}}) is None
    assert best({"a": ours, "b": {"sustained": 1.0, "failed_at": 2.0}}) == "a"
    assert best({"a": ours, "b": {"sustained": 1.0, "failed_at": None}}) is None
    assert best({"a": ours}) is None


def test_growth_of_the_latency_is_what_is_missing():
    """Ten a second for 3.9 s and an end that moves from 1 to 2.95 s: 40 answers in 4 + (2.7 - 1.2) * 4/3 s."""
    (schedule,) = rates(start=10, rates=1)
    timestamps = [request.at for request in schedule.requests]
    responses = [
        Response(index=index, scheduled=at, sent=at, finished=at + 1 + at / 2, token_times=(at + 1,), prompt_tokens=4)
        for index, at in enumerate(timestamps)
    ]
    found = pace(schedule, responses[::-1], Objectives())
    assert (found.offered, found.good, found.keeps_up) == (pytest.approx(10), 1, False)
    assert found.achieved == pytest.approx(40 / (4 + 1.5 * 4 / 3), rel=0.001)
    steady = [Response(**vars(each) | {"finished": each.scheduled + 3}) for each in responses]
    assert pace(schedule, steady, Objectives()).keeps_up
    assert pace(schedule, steady, Objectives(e2e=2.0)).why == "0% of the requests met the objectives"


def test_no_prompt_is_asked_twice():
    """A server that keeps prompts would be measured without the reading of them."""
    target = Queue("a", 0.01)
    planner = Planner(range(4000), 48)
    schedules = [planner.single(5, *LENGTHS), planner.concurrency(2, 5, *LENGTHS)]
    schedules += planner.saturation(*LENGTHS, start=1, factor=2, seconds=4, rates=2)
    record = run_virtual(measure([target], schedules, CLOCK, repeats=3, objectives=Objectives(), timeout=1e3))
    asked = target.log[record["targets"][0]["warm_up_requests"] :]
    assert len(asked) == 3 * 10 + 2 * 16 == len(set(asked))
