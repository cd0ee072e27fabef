"""What the suite plays schedules against, whatever it is: one request in, the timestamps of its tokens out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from benchmarks.suite.load.schedule import Planned


@dataclass(frozen=True)
class Completion:
    """What came of one request; timestamps are seconds of the clock that the driver uses. See `events.Response`."""

    token_times: tuple[float, ...]
    finished: float
    started: float | None = None
    streamed: bool = True
    counted: bool = True
    tokens: tuple[int, ...] | None = None
    text: str | None = None


class TargetError(Exception):
    """A request failed; the message says why, in one line. The run continues."""


class Target(Protocol):
    """A runtime or a server. `send` may be awaited many times at once; what the target cannot run at once waits.

    An attribute `starts_in` that a target may have says what `cold.starts_in` gives of it.
    """

    name: str
    """As the person named it."""
    label: str
    """What it is, for tables: "ONNX Runtime in this process, static batches"."""
    emulator: bool
    """Whether it only emulates what it is named after."""

    @property
    def precision(self) -> str | None:
        """Of its weights, None where that is not known."""

    async def start(self) -> None:
        """Load or reach it. Raises GPT2BundleError where that cannot be."""

    async def send(self, request: Planned) -> Completion:
        """Make exactly `request.new_tokens` tokens, greedily, past the end token. Raises TargetError."""

    async def stop(self) -> None:
        """Give everything back. May be called without `start`."""

    def pid(self) -> int | None:
        """The process that does the work, if it is on this machine and does nothing else."""
