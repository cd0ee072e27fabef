"""Events of an engine as asynchronous iterators, their loop woken once a step and not once a token."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator

from serving.engine.api import Engine, Event, FinishEvent, GenerationRequest, Handle


def stream(engine: Engine, request: GenerationRequest) -> EventStream:
    """Submit `request` and iterate over its events, ending after one FinishEvent for each continuation.

    Called in a running event loop, which never waits. What `Engine.submit` raises is raised here, at once. Closing the
    iterator (`aclose`), dropping it, or cancelling the task that waits for it cancels the request.
    """
    inbox = _Inbox(waits_for_flush=getattr(engine, "flushes", False))
    return EventStream(engine.submit(request, inbox), inbox, request.n)


class EventStream(AsyncIterator[Event]):
    """See `stream`."""

    def __init__(self, handle: Handle, inbox: _Inbox, continuations: int) -> None:
        self._handle, self._inbox, self._open = handle, inbox, continuations

    async def __anext__(self) -> Event:
        if not self._open:
            raise StopAsyncIteration
        try:
            event = await self._inbox.get()
        except BaseException:
            self._cancel()
            raise
        self._open -= isinstance(event, FinishEvent)
        return event

    async def aclose(self) -> None:
        """Cancel what still runs; no more events come."""
        self._cancel()

    def __del__(self) -> None:
        self._cancel()

    def _cancel(self) -> None:
        if self._open:
            self._open = 0
            self._handle.cancel()


class _Inbox:
    """The events of one request: a listener in the engine's thread, read in the loop's.

    `flush` is for engines whose `flushes` is true, which call it once for all of a step's events; for others, each
    event wakes the loop.
    """

    def __init__(self, waits_for_flush: bool) -> None:
        self._mailbox = _mailbox(asyncio.get_running_loop())
        self.flush = self._mailbox.flush
        self._waits_for_flush = waits_for_flush
        self._events: deque[Event] = deque()
        self._arrived = asyncio.Event()

    def __call__(self, event: Event) -> None:
        self._mailbox.put(self, event)
        if not self._waits_for_flush:
            self.flush()

    def receive(self, event: Event) -> None:
        self._events.append(event)
        self._arrived.set()

    async def get(self) -> Event:
        while not self._events:
            self._arrived.clear()
            await self._arrived.wait()
        return self._events.popleft()


class _Mailbox:
    """Events on their way to one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        # Weakly, since the loop is the key under which this is kept.
        self._loop = weakref.ref(loop)
        self._lock = threading.Lock()
        self._events: list[tuple[_Inbox, Event]] = []
        self._woken = False

    def put(self, inbox: _Inbox, event: Event) -> None:
        with self._lock:
            self._events.append((inbox, event))

    def flush(self) -> None:
        """Wake the loop, unless it is about to look anyway."""
        loop = self._loop()
        with self._lock:
            if self._woken or loop is None:
                return
            self._woken = True
        try:
            loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:
            return  # The loop is closed, and nobody waits any more.

    def _deliver(self) -> None:
        with self._lock:
            events, self._events, self._woken = self._events, [], False
        for inbox, event in events:
            inbox.receive(event)


_mailboxes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Mailbox] = weakref.WeakKeyDictionary()
_mailboxes_lock = threading.Lock()


def _mailbox(loop: asyncio.AbstractEventLoop) -> _Mailbox:
    with _mailboxes_lock:
        return _mailboxes.setdefault(loop, _Mailbox(loop))
