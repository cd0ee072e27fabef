"""The time that a driver sees: the machine's, or a virtual one in which waiting takes no time and is exact."""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar

_T = TypeVar("_T")
# An event loop on Linux waits for whole milliseconds; the last of them is waited out by turning round.
_LAST = 0.001


class Clock(Protocol):
    """Seconds of one monotonic clock."""

    def now(self) -> float:
        """This moment."""

    async def until(self, moment: float) -> None:
        """Return at `moment`, or at once if it is past."""


class WallClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        return time.monotonic()

    async def until(self, moment: float) -> None:
        while (left := moment - time.monotonic()) > 0:
            await asyncio.sleep(max(0.0, left - _LAST))


class LoopClock:
    """The running event loop's clock; inside `run_virtual`, the virtual one."""

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    async def until(self, moment: float) -> None:
        await asyncio.sleep(max(0.0, moment - self.now()))


def run_virtual(work: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine in a loop whose clock starts at 0 and jumps to the next timer instead of waiting for it.

    For work that waits for timers alone: a loop without a timer would wait for ever, and raises RuntimeError instead.
    """
    selector = _Jumping()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now  # type: ignore[method-assign]
    try:
        return loop.run_until_complete(work)
    finally:
        loop.close()


class _Jumping(selectors.DefaultSelector):
    """Moves its clock by what it is asked to wait for."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        found = super().select(0)
        if found:
            return found
        if timeout is None:
            raise RuntimeError("nothing is left to wait for")
        self.now += max(0.0, timeout)
        return []
