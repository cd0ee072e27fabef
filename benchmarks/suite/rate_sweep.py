"""The rate sweep to saturation: offered load rises until no target keeps up with it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.suite.figures.latency_metrics import Objectives, e2e, is_good
from benchmarks.suite.load.clock import Clock
from benchmarks.suite.load.events import Response
from benchmarks.suite.load.schedule import Schedule

KEEPS_UP = 0.95
"""Below this share of what was offered a target does not keep up."""
_FAILURES = 2


@dataclass(frozen=True)
class Pace:
    """How one target took one rate. Requests a second; `good` is the share of requests within the objectives."""

    offered: float
    achieved: float
    good: float
    keeps_up: bool
    why: str | None


@dataclass
class Standing:
    """One target in a sweep: every pace so far, in the order of the rates."""

    paces: list[Pace] = field(default_factory=list)

    @property
    def is_out(self) -> bool:
        """Whether it failed at two rates in a row; one alone may be a hiccup of the machine."""
        last = self.paces[-_FAILURES:]
        return len(last) == _FAILURES and not any(pace.keeps_up for pace in last)

    def summary(self) -> dict[str, Any]:
        """The highest rate it kept up with, the lowest above that it did not (None if the sweep ended before), why."""
        kept = [place for place, pace in enumerate(self.paces) if pace.keeps_up]
        above = self.paces[kept[-1] + 1 :] if kept else self.paces
        return {
            "sustained": self.paces[kept[-1]].offered if kept else None,
            "failed_at": above[0].offered if above else None,
            "why": above[0].why if above else None,
        }


def pace(schedule: Schedule, responses: Sequence[Response], objectives: Objectives) -> Pace:
    """Judge one rate from its responses.

    A target that keeps up ends the last request one latency after its time, as it did the first. What the latency
    has grown by meanwhile is time that it was behind: the growth is that of the median end-to-end latency from the
    first to the last quarter of the requests, which lie 3/4 of the window apart, so 4/3 of it over the whole. Achieved
    are the requests that were answered over window plus growth.
    """
    timestamps = [request.at or 0.0 for request in schedule.requests]
    count, gaps = len(timestamps), timestamps[-1] - timestamps[0]
    window = gaps * count / (count - 1) if gaps > 0 else 1e-9
    latencies = [e2e(response) for response in sorted(responses, key=lambda response: response.index)]
    quarter = max(1, count // 4)
    parts = [[value for value in part if value is not None] for part in (latencies[:quarter], latencies[-quarter:])]
    growth = max(0.0, float(np.median(parts[1]) - np.median(parts[0]))) * 4 / 3 if all(parts) else 0.0
    answered = sum(value is not None for value in latencies)
    offered, achieved = count / window, answered / (window + growth)
    good = sum(is_good(response, objectives) for response in responses) / count
    why = None
    if answered < KEEPS_UP * count:
        why = f"{count - answered} of {count} requests failed"
    elif achieved < KEEPS_UP * offered:
        why = f"answers came at {achieved / offered:.0%} of the rate"
    elif good < KEEPS_UP:
        why = f"{good:.0%} of the requests met the objectives"
    return Pace(offered, achieved, good, why is None, why)


async def sweep(
    names: Sequence[str],
    schedules: Sequence[Schedule],
    clock: Clock,
    objectives: Objectives,
    seconds: float,
    play: Callable[[str, Schedule, int], Awaitable[Sequence[Response]]],
) -> dict[str, Standing]:
    """Play the rates in order, each against every target that is not out, for `seconds` in all at most.

    `play` takes a target's name, a schedule and the schedule's place. No rate is begun after `seconds`.
    """
    standings = {name: Standing() for name in names}
    began = clock.now()
    for place, schedule in enumerate(schedules):
        left = [name for name in names if not standings[name].is_out]
        if not left or clock.now() - began >= seconds:
            break
        # Who goes first changes, so that nobody always runs after the same other.
        turn = place % len(left)
        for name in left[turn:] + left[:turn]:
            responses = await play(name, schedule, place)
            standings[name].paces.append(pace(schedule, responses, objectives))
    return standings


def best(summaries: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The target that sustains more than the rate at which every other failed, or None.

    A rate of the sweep was played once, so the next one to where another failed says nothing yet.
    """
    reached = {name: summary for name, summary in summaries.items() if summary["sustained"] is not None}
    if len(summaries) < 2 or not reached:
        return None
    name = max(reached, key=lambda each: float(reached[each]["sustained"]))
    others = [summary["failed_at"] for other, summary in summaries.items() if other != name]
    return name if all(limit is not None and limit < reached[name]["sustained"] for limit in others) else None
