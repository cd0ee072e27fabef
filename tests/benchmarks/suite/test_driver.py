"""The driver in virtual time, where every timestamp can be said beforehand."""

from __future__ import annotations

import asyncio
import time

import pytest

from benchmarks.suite.driver import play
from benchmarks.suite.load.clock import WallClock
from benchmarks.suite.load.schedule import Lengths, Planner
from benchmarks.suite.targets.base import Completion, TargetError
from tests.benchmarks.suite.virtual_clock import LoopClock, run_virtual

FIXED = Lengths(4, 4)
CLOCK = LoopClock()


class Scheduled:
    """Answers one request at a time: the first token after `first` seconds, each further one after `step`."""

    name = label = "scheduled"
    precision, emulator = None, False

    def __init__(self, first=0.5, step=0.125, slots=1, tokens=None, fails=()):
        self.first, self.step, self.tokens, self.fails = first, step, tokens, fails
        self.free = asyncio.Semaphore(slots)

    async def start(self):
        pass

    async def stop(self):
        pass

    def pid(self):
        return None

    async def send(self, request):
        if request.index in self.fails:
            raise TargetError("refused")
        async with self.free:
            started = CLOCK.now()
            await asyncio.sleep(self.first)
            times = [CLOCK.now()]
            for _ in range((self.tokens or request.new_tokens) - 1):
                await asyncio.sleep(self.step)
                times.append(CLOCK.now())
            return Completion(tuple(times), times[-1], started=started)


def drive(schedule, timeout=300.0, **settings):
    async def work():
        return await play(schedule, Scheduled(**settings), CLOCK, timeout)

    return run_virtual(work())


def planner():
    return Planner(range(50), 48)


def test_one_client_sends_when_it_has_the_last_answer():
    found = drive(planner().single(3, FIXED, FIXED))
    assert [response.scheduled for response in found] == pytest.approx([0, 0.875, 1.75])
    assert found[1].token_times == pytest.approx((1.375, 1.5, 1.625, 1.75))
    assert all(response.sent == response.scheduled and response.error is None for response in found)


def test_an_open_loop_waits_for_nobody_and_latency_begins_at_the_scheduled_moment():
    schedule = planner().server(3, FIXED, FIXED, rate=4, arrivals="constant")
    found = drive(schedule)
    start = found[0].scheduled - 0.25
    assert [response.scheduled - start for response in found] == pytest.approx([0.25, 0.5, 0.75])
    assert [response.finished - start for response in found] == pytest.approx([1.125, 2.0, 2.875])
    assert [response.started - start for response in found] == pytest.approx([0.25, 1.125, 2.0])


def test_the_clients_of_a_closed_loop_are_as_many_as_asked_for():
    found = drive(planner().concurrency(3, 7, FIXED, FIXED), slots=10)
    assert [response.scheduled for response in found] == pytest.approx([0] * 3 + [0.875] * 3 + [1.75])


def test_failures_late_ends_and_short_answers_are_responses_too():
    found = drive(planner().offline(2, FIXED, FIXED), fails={1}, slots=2)
    assert [response.error for response in found] == [None, "refused"]
    found = drive(planner().offline(1, FIXED, FIXED), timeout=0.6)
    assert "0.6 seconds" in found[0].error and found[0].finished - found[0].sent == pytest.approx(0.6)
    assert "3 tokens instead of 4" in drive(planner().offline(1, FIXED, FIXED), tokens=3)[0].error


def test_virtual_time_costs_none_and_does_not_hang():
    began = time.monotonic()
    assert run_virtual(_sleep(86_400)) == 86_400
    assert time.monotonic() - began < 10
    with pytest.raises(RuntimeError, match="nothing is left"):
        run_virtual(asyncio.Event().wait())


async def _sleep(seconds):
    await asyncio.sleep(seconds)
    return CLOCK.now()


def test_the_wall_clock_does_not_wake_early():
    async def work():
        timestamp = time.monotonic() + 0.02
        await WallClock().until(timestamp)
        return time.monotonic() - timestamp

    assert asyncio.run(work()) >= 0
