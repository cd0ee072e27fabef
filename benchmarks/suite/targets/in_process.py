"""Runtimes in this process: a backend that runs static batches, and an engine that batches continuously."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.common.engine_stream import Stream
from benchmarks.common.static_batch import BackendRunner
from benchmarks.suite.load.schedule import Planned
from benchmarks.suite.targets.base import Completion, Target, TargetError, settled
from serving.backends.base import Backend
from serving.engine.api import Engine, GenerationRequest
from serving.errors import GPT2BundleError
from serving.generation import generate
from serving.sampling import SamplingParams


@dataclass(eq=False)
class _PendingRequest:
    request: Planned
    done: Callable[[Completion | str], None]
    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


class BatchTarget(Target):
    """A backend under the plainest of schedulers: whatever waits runs as one batch, to its end, `most` rows at most.

    Args:
        open_backend: loads the backend, in `start`.
    """

    starts_in = "ours"

    def __init__(self, name: str, label: str, precision: str, open_backend: Callable[[], Backend], most: int) -> None:
        super().__init__(name, f"{label}, static batches of at most {most}", precision)
        self._open, self._most = open_backend, most
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
        return await settled(lambda done: self._jobs.put(_PendingRequest(request, done)))

    async def stop(self) -> None:
        if self._thread is not None:
            self._jobs.put(None)
            await asyncio.to_thread(self._thread.join)
            self._thread = self.runner = None

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


class EngineTarget(Target):
    """An engine of `serving.engine.api`, in this process or over a server's slots.

    The prompt has been read at a request's first event, so the start of that work is not known.

    Args:
        open_engine: opens it, in `start`.
    """

    starts_in = "ours"

    def __init__(self, name: str, label: str, precision: str | None, open_engine: Callable[[], Engine]) -> None:
        super().__init__(name, label, precision)
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
        try:
            return await settled(lambda done: Stream(engine, asked, lambda stream: done(_completion(stream))))
        except GPT2BundleError as error:
            raise TargetError(str(error)) from None

    async def stop(self) -> None:
        if self._engine is not None:
            await asyncio.to_thread(self._engine.close)
            self._engine = None


def _completion(stream: Stream) -> Completion | str:
    (end,) = stream.ends
    if end.reason not in ("stop", "length"):
        return end.message or f"ended by {end.reason}"
    times, tokens = stream.times[0], stream.tokens[0]
    return Completion(tuple(times), time.monotonic(), tokens=tuple(tokens), text="".join(stream.text))
