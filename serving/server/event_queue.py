"""From the event loop to the engine and back: submit, take events as they come, cancel when the client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from starlette.requests import Request

from serving.engine.api import DrainingError, Engine, Event, FinishEvent, GenerationRequest, Handle, Listener
from serving.sampling import SamplingParams
from serving.server.errors import ClientGoneError, FieldError
from serving.server.registry import ModelRegistry, ServedModel

TIMEOUT_HEADER = "X-Request-Timeout"
_MANY = 64
"""Continuations of one call from which on they are submitted in another thread."""
_LONG = 1024
"""The same for characters of stop texts and entries of a bias together."""
_Result = TypeVar("_Result")


class EventQueue:
    """Requests of one call under way, from `loop`'s thread; their events come in batches, in order.

    An event is (which request, event). The engine's thread wakes the loop once for all that has come since it last
    looked, so a late loop does less work for each token. With `whole`, only the end of a
    continuation wakes it.
    """

    def __init__(self, requests: Sequence[GenerationRequest], whole: bool = False) -> None:
        self._requests, self._whole = requests, whole
        self._loop = asyncio.get_running_loop()
        self._events: deque[tuple[int, Event]] = deque()
        self._notified = False
        self._waiter: asyncio.Future[None] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._handles: list[Handle] = []
        self._open = sum(request.n for request in requests)
        self._cancelled = self.client_gone = False

    @classmethod
    async def open(cls, engine: Engine, requests: Sequence[GenerationRequest], whole: bool = False) -> EventQueue:
        """Submit all of `requests` or, if one is refused, none: raises what `Engine.submit` raises."""
        generation = cls(requests, whole)
        try:
            await beside_if(takes_long(requests), lambda: generation._submit(engine))
        except BaseException:
            generation.cancel()
            raise
        return generation

    def _submit(self, engine: Engine) -> None:
        for index, request in enumerate(one_call(engine, self._requests)):
            handle = engine.submit(request, self._listener(index))
            self._handles.append(handle)
            if self._cancelled:  # By the loop, while this runs in another thread.
                handle.cancel()
                return

    def _listener(self, index: int) -> Listener:
        def listen(event: Event) -> None:  # In the engine's thread.
            self._events.append((index, event))
            if not self._notified and (not self._whole or type(event) is FinishEvent):
                self._notified = True
                with contextlib.suppress(RuntimeError):  # The loop is closed.
                    self._loop.call_soon_threadsafe(self._wake)

        return listen

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self) -> list[tuple[int, Event]]:
        """What has come since the last call, at least one event; empty once every continuation has ended.

        Raises ClientGoneError when the client has gone away.
        """
        while self._open:
            # Cleared before the queue is emptied: what comes in between is taken now or wakes the loop again.
            self._notified = False
            if self.client_gone:
                raise ClientGoneError("the client went away")
            if batch := self.take():
                return batch
            self._waiter = self._loop.create_future()
            await self._waiter
        return []

    def take(self) -> list[tuple[int, Event]]:
        """What has come since the last call, without waiting."""
        batch: list[tuple[int, Event]] = []
        while self._events:
            batch.append(self._events.popleft())
        self._open -= sum(type(event) is FinishEvent for _, event in batch)
        return batch

    def watch(self, request: Request) -> None:
        """Cancel as soon as the client of `request`, whose body has been read, goes away."""

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            if self._open:
                self.client_gone = True
                self.cancel()
                self._wake()

        self._watch = asyncio.create_task(watch())

    def cancel(self) -> None:
        """Free every slot within one step."""
        self._cancelled = True
        for handle in list(self._handles):
            handle.cancel()

    def close(self) -> None:
        """End what is still open and stop watching the client. May be called more than once."""
        if self._open:
            self.cancel()
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None


def one_call(engine: Engine, requests: Sequence[GenerationRequest]) -> Iterator[GenerationRequest]:
    """`requests` of one call, to be submitted as they come. What submitting takes counts in the time of each.

    Where nobody waits, all of them may, however short the queue is.
    """
    began, joins = time.monotonic(), len(requests) > 1 and not engine.stats().waiting_requests
    for index, request in enumerate(requests):
        timeout = time_left(request.timeout, began)
        yield replace(request, timeout=timeout, joins_call=joins and index > 0) if len(requests) > 1 else request


def time_left(limit: float | None, began: float) -> float | None:
    """What is left of `limit` seconds since `began` on the monotonic clock, above 0."""
    return None if limit is None else max(1e-3, limit - (time.monotonic() - began))


def takes_long(requests: Sequence[GenerationRequest]) -> bool:
    """Whether taking `requests` in takes an engine so long that the event loop should not wait for it."""
    if sum(request.n for request in requests) > _MANY:
        return True
    params = requests[0].params if requests else SamplingParams()
    return sum(map(len, params.stop)) + len(params.logit_bias) + len(params.stop_token_ids) > _LONG


async def beside_if(long: bool, work: Callable[[], _Result]) -> _Result:
    """The result of `work`, done in another thread where it takes `long`."""
    return await asyncio.to_thread(work) if long else work()


async def submit(
    registry: ModelRegistry, name: str, make: Callable[[ServedModel], Awaitable[Sequence[GenerationRequest]]]
) -> tuple[ServedModel, EventQueue]:
    """Submit what `make` makes for the version of `name` that answers now, or for its successor if it is swapped."""

    async def begin(model: ServedModel) -> EventQueue:
        return await EventQueue.open(model.engine, await make(model))

    return await with_model(registry, name, None, begin)


async def with_model(
    registry: ModelRegistry, name: str, version: int | None, work: Callable[[ServedModel], Awaitable[_Result]]
) -> tuple[ServedModel, _Result]:
    """What `work` gives for `version` of `name`, or for the one that answers now, and which one that was.

    If its engine takes nothing new because it is on its way out, `work` is done again with the version that took over;
    so `work` may not have given anything out when it raises DrainingError. Raises what `ModelRegistry.get` and `work`
    raise; DrainingError itself only when there is no other version to go to.
    """
    while True:
        model = registry.get(name, version)
        try:
            return model, await work(model)
        except DrainingError:
            if registry.get(name, version) is model:
                raise


def time_limit(request: Request, default: float | None) -> float | None:
    """Seconds that a request may take: what its header X-Request-Timeout asks for, at most `default`.

    Raises FieldError if the header is not a number above 0.
    """
    text = request.headers.get(TIMEOUT_HEADER)
    if text is None:
        return default
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (seconds > 0 and math.isfinite(seconds)):
        raise FieldError(f"the header {TIMEOUT_HEADER} is {text[:80]!r}; write seconds above 0, such as 2.5", None)
    return seconds if default is None else min(seconds, default)
