"""What the suite plays schedules against, whatever it is: one request in, the timestamps of its tokens out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

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


class Target:
    """A runtime or a server. `send` may be awaited many times at once; what the target cannot run at once waits.

    Attributes:
        name: as the person named it.
        label: what it is, for tables: "ONNX Runtime in this process, static batches".
        precision: of its weights, None where that is not known.
        emulator: whether it only emulates what it is named after.
        process: the process that does the work, if it is on this machine and does nothing else.
        starts_in: "ours" if a process of ours runs it, "own" if `start` starts one, None if it runs already elsewhere.
    """

    starts_in: str | None = None

    def __init__(
        self, name: str, label: str, precision: str | None = None, emulator: bool = False, process: int | None = None
    ) -> None:
        self.name, self.label, self.precision = name, label, precision
        self.emulator, self.process = emulator, process

    async def start(self) -> None:
        """Load or reach it. Raises GPT2BundleError where that cannot be."""

    async def send(self, request: Planned) -> Completion:
        """Make exactly `request.new_tokens` tokens, greedily, past the end token. Raises TargetError."""
        raise NotImplementedError

    async def stop(self) -> None:
        """Give everything back. May be called without `start`."""

    def pid(self) -> int | None:
        """Return `process`, once the target is started."""
        return self.process


class StartedTarget(Target):
    """A server that is started for the run, asked by another target, and ended after it.

    Args:
        open_server: starts the server and returns the target that speaks to it; it may block.
        close_server: ends what `open_server` began, even if that failed; it may block.
    """

    starts_in = "own"

    def __init__(
        self,
        name: str,
        label: str,
        precision: str | None = None,
        *,
        open_server: Callable[[], Target],
        close_server: Callable[[], None],
        emulator: bool = False,
    ) -> None:
        super().__init__(name, label, precision, emulator)
        self._open, self._close = open_server, close_server
        self.inner: Target | None = None

    async def start(self) -> None:
        self.inner = await asyncio.to_thread(self._open)
        await self.inner.start()
        self.label, self.process = self.inner.label, self.inner.process

    async def send(self, request: Planned) -> Completion:
        if self.inner is None:
            raise TargetError(f"{self.name} is not started")
        return await self.inner.send(request)

    async def stop(self) -> None:
        inner, self.inner, self.process = self.inner, None, None
        if inner is not None:
            await inner.stop()
        await asyncio.to_thread(self._close)


@dataclass
class Pieces:
    """The pieces of one streamed text: when each came, its text, and what the server says of its tokens."""

    times: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def add(self, timestamp: float, text: str, number: int | None, tokens: list[int]) -> None:
        """Note a piece with a text or a number of tokens; others are no pieces."""
        if text or number:
            self.times.append(timestamp)
            self.texts.append(text)
            self.numbers += [] if number is None else [number]
            self.tokens += tokens

    def completion(self, reason: str | None, asked: int, finished: float) -> Completion:
        """Return the answer, which ended by `reason`; see `timestamps_of`."""
        times, counted = timestamps_of(self.times, self.numbers, reason, asked, finished)
        known = tuple(self.tokens) if len(self.tokens) == len(times) else None
        return Completion(tuple(times), finished, counted=counted, tokens=known, text="".join(self.texts))


def timestamps_of(
    times: list[float], numbers: list[int], reason: str | None, asked: int, finished: float
) -> tuple[list[float], bool]:
    """A timestamp for each token of an answer in pieces at `times`, and whether the server told their number.

    `numbers` are the tokens of each piece where the server says them.
    """
    if len(numbers) == len(times) and numbers:
        return [timestamp for timestamp, number in zip(times, numbers, strict=True) for _ in range(number)], True
    if len(times) == asked:
        return times, True
    # Half a character makes no text, so that pieces may be fewer than tokens; that all were made the server must say.
    return (share(times, asked, finished), False) if reason == "length" else (times, False)


def share(times: list[float], tokens: int, finished: float) -> list[float]:
    """A timestamp for each of `tokens` tokens that came in pieces at `times`: equal shares, the first ones the rest.

    Pieces beyond the tokens are the end of a text that was held back, and are no tokens. Tokens that made no text at
    all have come at the end.
    """
    if not times:
        return [finished] * tokens
    if tokens <= len(times):
        return times[:tokens]
    each, more = divmod(tokens, len(times))
    return [timestamp for place, timestamp in enumerate(times) for _ in range(each + (place < more))]


async def settled(submit: Callable[[Callable[[Completion | str], None]], object]) -> Completion:
    """Hand in a request and wait for what another thread says of it. Raises TargetError for a text.

    Errors that `submit` raises are the caller's to translate.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Completion | str] = loop.create_future()

    def settle(answer: Completion | str) -> None:
        if not future.done():
            future.set_result(answer)

    def done(answer: Completion | str) -> None:
        loop.call_soon_threadsafe(settle, answer)

    submit(done)
    answer = await future
    if isinstance(answer, str):
        raise TargetError(answer)
    return answer
