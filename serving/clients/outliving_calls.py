"""Calls that outlive their callers: a caller that stops waiting never cancels the call, which ends by itself.

A model server turns a caller's deadline into a cancellation of the work under way, and calls over slots share their
work. So such a call has a long deadline of its own, and a caller's patience only ends its waiting.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, NoReturn, TypeVar

from serving.errors import ServerError

# Seconds after which a server that does not answer is given up for good.
CALL_SECONDS = 120.0
# Seconds that calls under way have when the program ends.
_AT_EXIT = 5.0
_T = TypeVar("_T")
_under_way: set[threading.Thread] = set()


class CallGoesOnError(ServerError):
    """The caller's patience ended, and the call did not."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"no answer within the {seconds:g} s of the caller; the call continues", "DEADLINE_EXCEEDED")


class OutlivingCalls(Generic[_T]):
    """The tries of one request, each in a thread of its own; the first to end is what the caller gets.

    Args:
        send: sends the request and returns its answer.
        late: is given the answer of each try that ends after its caller stopped waiting, or None for its error.
    """

    def __init__(self, send: Callable[[], _T], late: Callable[[_T | None], None] | None = None) -> None:
        self._send, self._late = send, late
        self._lock, self._left = threading.Lock(), False
        self._ended: queue.SimpleQueue[Callable[[], _T]] = queue.SimpleQueue()

    def start(self) -> None:
        """Send the request, again if it was sent before."""
        thread = threading.Thread(target=self._run, name="call", daemon=True)
        _under_way.add(thread)
        thread.start()

    def wait(self, seconds: float) -> _T:
        """What the next try to end gave. Raises its error, and TimeoutError if none ends in `seconds`."""
        try:
            outcome = self._ended.get(timeout=max(0.0, seconds))
        except queue.Empty:
            raise TimeoutError from None
        return outcome()

    def leave(self) -> None:
        """Wait no more: tries under way, and those that ended unheard, are for `late`."""
        with self._lock:
            self._left = True
        while True:
            try:
                end = self._ended.get_nowait()
            except queue.Empty:
                return
            value = None
            with contextlib.suppress(BaseException):
                value = end()
            if self._late is not None:
                self._late(value)

    def _run(self) -> None:
        value: _T | None = None
        end: Callable[[], _T]
        try:
            answer = value = self._send()
            end = functools.partial(_same, answer)
        except BaseException as error:
            end = functools.partial(_fail, error)
        with self._lock:
            late = self._left
            self._ended.put(end)
        try:
            if late and self._late is not None:
                self._late(value)
        finally:
            _under_way.discard(threading.current_thread())


def _same(value: _T) -> _T:
    return value


def _fail(error: BaseException) -> NoReturn:
    raise error


@atexit.register
def _let_end() -> None:
    """A program that ends would close its connections, which the server takes for cancellations."""
    deadline = time.monotonic() + _AT_EXIT
    for thread in list(_under_way):
        thread.join(max(0.0, deadline - time.monotonic()))
