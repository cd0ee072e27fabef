"""The suite against a server of known latency, with real clocks: is every figure within 1 % of what it must be?

What must come out is worked out here from the server's two numbers alone, without the suite's own metrics. A machine
that is busy with other things makes the server itself late, or its client: both are watched, and a play in which
either was is repeated rather than judged.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.suite.driver import play
from benchmarks.suite.figures.latency_metrics import Objectives
from benchmarks.suite.figures.record_rows import Repeat, make_point
from benchmarks.suite.load.clock import WallClock
from benchmarks.suite.load.schedule import Lengths, Planner, Schedule
from benchmarks.suite.selfcheck.client_overhead import fake_process, lateness
from benchmarks.suite.targets.openai import OpenAITarget
from serving.errors import GPT2BundleError

TOLERANCE = 0.01
FIRST, STEP = 0.4, 0.1
"""Seconds to the first token and from each to the next: the percent of a step is a millisecond, which a machine that
has nothing else to do keeps."""
PRICE = 3.6
_TRIES = 12
# Half of what a step may be off: what is later than this is the machine's fault and not the suite's.
_LATE = TOLERANCE * STEP / 2
_TICK = 0.005


class SelfTestError(GPT2BundleError):
    """The suite is wrong, or the machine never let it be right."""


@dataclass(frozen=True)
class Check:
    """One figure of one point, and what it must be."""

    point: str
    figure: str
    found: float | None
    expected: float | None

    @property
    def error(self) -> float:
        """Relative difference; infinite where one of both has no value."""
        if self.found is None or self.expected is None:
            return 0.0 if self.found is self.expected else float("inf")
        return abs(self.found / self.expected - 1)


def schedules() -> list[Schedule]:
    """One client, arrivals that wait for nobody, and three clients; outputs of 2 to 6 tokens."""
    planner = Planner(range(1, 100), 64)
    lengths = Lengths(4, 4), Lengths(2, 6, "uniform")
    return [
        planner.single(4, *lengths),
        planner.server(12, *lengths, rate=12, arrivals="poisson"),
        planner.concurrency(3, 9, *lengths),
    ]


def expected(schedule: Schedule, objectives: Objectives) -> dict[str, float | None]:
    """Every figure of a schedule against that server, whose answers do not wait for each other."""
    made = [request.new_tokens for request in schedule.requests]
    e2e = [FIRST + (count - 1) * STEP for count in made]
    if schedule.concurrency is None:
        timestamps = [request.at or 0.0 for request in schedule.requests]
        whole = max(at + took for at, took in zip(timestamps, e2e, strict=True)) - min(timestamps)
    else:
        # Each client takes the next request when it is free.
        free = [0.0] * schedule.concurrency
        for took in e2e:
            heapq.heappush(free, heapq.heappop(free) + took)
        whole = max(free)
    good = sum(objectives.e2e is None or took <= objectives.e2e for took in e2e)
    values = {"ttft": [FIRST] * len(made), "inter_token": [STEP], "tpot": [STEP], "e2e": e2e}
    found: dict[str, float | None] = {}
    for name, each in values.items():
        numbers = [float(np.mean(each)), *np.quantile(each, (0.5, 0.9, 0.99)).tolist()]
        pairs = zip(("mean", "p50", "p90", "p99"), numbers, strict=True)
        found |= {f"{kind}_{name}_ms": number * 1e3 for kind, number in pairs}
    # Over HTTP nobody tells when work began.
    found |= {f"{kind}_queue_ms": None for kind in ("mean", "p50", "p90", "p99")}
    tokens = sum(made)
    return found | {
        "output_tokens_per_second": tokens / whole,
        "input_tokens_per_second": sum(len(request.prompt) for request in schedule.requests) / whole,
        "requests_per_second": len(made) / whole,
        "goodput": good / whole,
        "cost_per_million_tokens": PRICE / 3600 * whole / tokens * 1e6,
    }


def run_selftest(say: Callable[[str], None]) -> list[Check]:
    """Play each schedule until it shows every figure within 1 %, and return all checks.

    Raises SelfTestError with the figures that are not, if that is so while neither server nor client was late, and,
    saying so, if one of them was at every try.
    """
    return [check for schedule in schedules() for check in _settle(schedule, say)]


def _settle(schedule: Schedule, say: Callable[[str], None]) -> list[Check]:
    lates = []
    for _ in range(_TRIES):
        checks, late = asyncio.run(_try(schedule))
        wrong = [check for check in checks if check.error > TOLERANCE]
        if not wrong:
            return checks
        if late <= _LATE:
            told = "; ".join(f"{each.figure} is {each.found} and not {each.expected}" for each in wrong)
            raise SelfTestError(f"{schedule.point}: {len(wrong)} of {len(checks)} figures are not within 1 %: {told}")
        lates.append(f"{late * 1e3:.1f} ms")
        worst = max(wrong, key=lambda check: check.error)
        say(
            f"{schedule.point}: {worst.figure} is off by {worst.error:.1%}, but the machine was {lates[-1]} late; again"
        )
    raise SelfTestError(
        f"{schedule.point}: no verdict, since the machine was late at every try (by {', '.join(lates)}); "
        "end what else runs on it"
    )


async def _try(schedule: Schedule) -> tuple[list[Check], float]:
    """The checks of one play, and by how many seconds server or client missed a time at worst."""
    objectives = Objectives(e2e=FIRST + 2.5 * STEP)
    watch = _Watch()
    with fake_process(FIRST, STEP) as (address, process):
        target = OpenAITarget("fake", address, process=process)
        await target.start()
        repeat = Repeat(await play(schedule, target, WallClock()))
        late = max(watch.end(), lateness(address))
    point = make_point(schedule, [target], {target.name: [repeat]}, objectives, PRICE)
    figures: dict[str, list[float | None]] = point["rows"][0]["figures"]
    wanted = expected(schedule, objectives)
    return [Check(schedule.point, name, figures[name][0], value) for name, value in wanted.items()], late


class _Watch:
    """Wakes up again and again, and knows how late it was at worst."""

    def __init__(self) -> None:
        self._worst, self._ended = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> float:
        """Seconds."""
        self._ended.set()
        self._thread.join()
        return self._worst

    def _run(self) -> None:
        while not self._ended.is_set():
            began = time.monotonic()
            time.sleep(_TICK)
            self._worst = max(self._worst, time.monotonic() - began - _TICK)


def table(checks: Sequence[Check]) -> list[str]:
    """A line for each point: how many figures, and the one that is furthest off."""
    lines = []
    for point, group in itertools.groupby(checks, key=lambda check: check.point):
        known = [check for check in group if check.expected is not None]
        worst = max(known, key=lambda check: check.error)
        lines.append(f"{point}: {len(known)} figures within 1 %; furthest off is {worst.figure}, by {worst.error:.2%}")
    return lines
