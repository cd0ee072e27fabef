"""Plays a schedule against a target and writes down what a client saw."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

from benchmarks.suite.load.clock import Clock
from benchmarks.suite.load.events import Response
from benchmarks.suite.load.schedule import Planned, Schedule
from benchmarks.suite.targets.base import Target, TargetError

# Time to set up the first request before its time comes.
_LEAD = 0.01


async def play(schedule: Schedule, target: Target, clock: Clock, timeout: float = 300.0) -> list[Response]:
    """Send every request of `schedule` and return the responses in its order.

    In an open loop each request goes out at its time, whatever came of those before, and its latency begins at that
    timestamp even if the client was late. In a closed loop each of the schedule's clients sends the next request that
    nobody has sent yet as soon as its last has ended, which is then the scheduled time. A request that has not ended
    after `timeout` seconds is given up and counts as failed.
    """

    async def at(timestamp: float, request: Planned) -> Response:
        await clock.until(timestamp)
        return await _send(timestamp, request, target, clock, timeout)

    async def client(left: Iterator[Planned]) -> list[Response]:
        return [await _send(clock.now(), request, target, clock, timeout) for request in left]

    if schedule.concurrency is None:
        start = clock.now() + _LEAD
        return await asyncio.gather(*(at(start + (each.at or 0.0), each) for each in schedule.requests))
    left = iter(schedule.requests)
    found = await asyncio.gather(*(client(left) for _ in range(schedule.concurrency)))
    return sorted((response for responses in found for response in responses), key=lambda response: response.index)


async def _send(scheduled: float, request: Planned, target: Target, clock: Clock, timeout: float) -> Response:
    fixed: dict[str, Any] = {"index": request.index, "scheduled": scheduled, "sent": clock.now()}
    fixed["prompt_tokens"] = len(request.prompt)
    try:
        async with asyncio.timeout(timeout):
            answer = await target.send(request)
    except (TargetError, TimeoutError) as error:
        reason = str(error) if isinstance(error, TargetError) else f"no end after {timeout:g} seconds"
        return Response(finished=clock.now(), token_times=(), error=reason, **fixed)
    made = len(answer.token_times)
    message: str | None = None
    if made != request.new_tokens:
        message = f"{made} tokens instead of {request.new_tokens}, so its figures are not those of the schedule"
    return Response(error=message, **vars(answer), **fixed)
