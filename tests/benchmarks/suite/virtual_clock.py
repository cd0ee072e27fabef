"""A time in which waiting takes none and is exact, for whatever waits for timers alone."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


class LoopClock:
    """The running event loop's clock; inside `run_virtual`, the virtual one."""

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    async def until(self, timestamp: float) -> None:
        await asyncio.sleep(max(0.0, timestamp - self.now()))


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
