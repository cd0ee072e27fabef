"""Runtimes in this process: a backend that runs static batches, and an engine that batches continuously."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.common.static_batch import BackendRunner
from benchmarks.suite.load.schedule import Planned
from benchmarks.suite.targets.base import Completion, TargetError
from serving.backends.base import Backend
from serving.engine.api import Engine, Event, FinishEvent, GenerationRequest, PromptEvent, TokenEvent
from serving.errors import GPT2BundleError
from serving.generation import generate
from serving.sampling import SamplingParams


@dataclass(eq=False)
class _PendingRequest:
    request: Planned
    done: Callable[[Completion | str], None]
    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


class BatchTarget:
    """A backend under the plainest of schedulers: whatever waits runs as one batch, to its end, `most` rows at most.

    Args:
        open_backend: loads the backend, in `start`.
    """

    emulator = False
    starts_in = "ours"

    def __init__(self, name: str, label: str, precision: str, open_backend: Callable[[], Backend], most: int) -> None:
        self.name, self.precision, self._open, self._most = name, precision, open_backend, most
        self.label = f"{label}, static batches of at most {most}"
        self._jobs: queue.SimpleQueue[_PendingRequest | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.runner: BackendRunner | None = None
        """What runs static batches, between `start` and `stop`, while no request waits."""

    async def start(self) -> None:
        backend = await asyncio.to_thread(self._open)
        self.runner = BackendRunner(backend)
        self._thread = threading.Thread(target=self._work, args=(backend,), name=self.name, daemon=True)
        self._thread.start()

    async def send(self, request: Planned) -> Completion:
        return await _ask(lambda done: self._jobs.put(_PendingRequest(request, done)))

    async def stop(self) -> None:
        if self._thread is not None:
            self._jobs.put(None)
            await asyncio.to_thread(self._thread.join)
            self._thread = self.runner = None

    def pid(self) -> int | None:
        return None

    def _work(self, backend: Backend) -> None:
        while (first := self._jobs.get()) is not None:
            batch: list[_PendingRequest] = [first]
            with contextlib.suppress(queue.Empty):
                while len(batch) < self._most:
                    job = self._jobs.get_nowait()
                    if job is None:
                        self._jobs.put(None)
                        break
                    batch.append(job)
            _run_batch(backend, batch)


def _run_batch(backend: Backend, batch: list[_PendingRequest]) -> None:
    started = time.monotonic()

    def note(row: int, token: int) -> None:
        job = batch[row]
        job.times.append(time.monotonic())
        job.tokens.append(token)
        if len(job.times) == job.request.new_tokens:
            job.done(Completion(tuple(job.times), job.times[-1], started=started, tokens=tuple(job.tokens)))

    params = [SamplingParams(max_new_tokens=job.request.new_tokens, ignore_eos=True) for job in batch]
    try:
        # The end token has no meaning where it is ignored.
        generate(backend, [job.request.prompt for job in batch], params, eos_token_id=-1, on_token=note)
    except Exception as error:  # Whatever a runtime raises is these requests' failure, not the suite's.
        for job in batch:
            job.done(f"{type(error).__name__}: {error}")


class EngineTarget:
    """An engine of `serving.engine.api`, in this process or over a server's slots.

    Args:
        open_engine: opens it, in `start`.
        starts_in: "ours" if it runs in this process, None if it is a client of something that runs already.
    """

    def __init__(
        self,
        name: str,
        label: str,
        precision: str | None,
        open_engine: Callable[[], Engine],
        emulator: bool = False,
        starts_in: str | None = "ours",
    ) -> None:
        self.name, self.label, self.precision, self.emulator = name, label, precision, emulator
        self.starts_in = starts_in
        self._open = open_engine
        self._engine: Engine | None = None

    async def start(self) -> None:
        self._engine = await asyncio.to_thread(self._open)

    async def send(self, request: Planned) -> Completion:
        engine = self._engine
        if engine is None:
            raise TargetError(f"{self.name} is not started")
        params = SamplingParams(max_new_tokens=request.new_tokens, ignore_eos=True)
        asked = GenerationRequest(request.prompt, params)

        def submit(done: Callable[[Completion | str], None]) -> None:
            engine.submit(asked, _Listener(done))

        return await _ask(submit)

    async def stop(self) -> None:
        if self._engine is not None:
            await asyncio.to_thread(self._engine.close)
            self._engine = None

    def pid(self) -> int | None:
        return None


class _Listener:
    """Notes the timestamps of one request's events; called in the engine's thread.

    The prompt has been read at its first event, so the start of that work is not known.
    """

    def __init__(self, done: Callable[[Completion | str], None]) -> None:
        self._done = done
        self._times: list[float] = []
        self._tokens: list[int] = []
        self._text: list[str] = []

    def __call__(self, event: Event) -> None:
        now = time.monotonic()
        if isinstance(event, PromptEvent):
            return
        self._text.append(event.text)
        if isinstance(event, TokenEvent):
            self._times.append(now)
            self._tokens.append(event.token_id)
        elif isinstance(event, FinishEvent) and event.reason in ("stop", "length"):
            text = "".join(self._text)
            self._done(Completion(tuple(self._times), now, tokens=tuple(self._tokens), text=text))
        else:
            self._done(event.message or f"ended by {event.reason}")


async def _ask(submit: Callable[[Callable[[Completion | str], None]], None]) -> Completion:
    """Hand in a request and wait for what another thread says of it. Raises TargetError."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Completion | str] = loop.create_future()

    def settle(answer: Completion | str) -> None:
        if not future.done():
            future.set_result(answer)

    def done(answer: Completion | str) -> None:
        loop.call_soon_threadsafe(settle, answer)

    try:
        submit(done)
    except GPT2BundleError as error:
        raise TargetError(str(error)) from None
    answer = await future
    if isinstance(answer, str):
        raise TargetError(answer)
    return answer
