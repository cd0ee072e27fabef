"""The time that a driver sees."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

# An event loop on Linux waits for whole milliseconds; the last of them is waited out by turning round.
_LAST = 0.001


class Clock(Protocol):
    """Seconds of one monotonic clock."""

    def now(self) -> float:
        """The current time."""

    async def until(self, timestamp: float) -> None:
        """Return at `timestamp`, or at once if it is past."""


class WallClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        return time.monotonic()

    async def until(self, timestamp: float) -> None:
        while (left := timestamp - time.monotonic()) > 0:
            await asyncio.sleep(max(0.0, left - _LAST))
