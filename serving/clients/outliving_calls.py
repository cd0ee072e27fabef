"""Calls that outlive their callers: who stops waiting leaves the call to end by itself, and never cancels it.

A model server turns a caller's deadline into a cancellation of the work under way, and calls over slots share their
work. So such a call has a long deadline of its own, and a caller's patience only ends its waiting.
"""

from __future__ import annotations

import atexit
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


class OutlivingCalls(Generic[_T]):
    """The tries of one request, each in a thread of its own; the first to end is what the caller gets."""

    def __init__(self, send: Callable[[], _T]) -> None:
        self._send = send
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

    def _run(self) -> None:
        try:
            value = self._send()
            self._ended.put(lambda: value)
        except BaseException as error:
            self._ended.put(functools.partial(_fail, error))
        finally:
            _under_way.discard(threading.current_thread())


def _fail(error: BaseException) -> NoReturn:
    raise error


def no_answer(seconds: float) -> ServerError:
    """The error of a caller whose patience ended."""
    return ServerError(
        f"no answer within the {seconds:g} s that the caller waits; the call goes on", "DEADLINE_EXCEEDED"
    )


@atexit.register
def _let_end() -> None:
    """A program that ends would close its connections, which the server takes for cancellations."""
    deadline = time.monotonic() + _AT_EXIT
    for thread in list(_under_way):
        thread.join(max(0.0, deadline - time.monotonic()))
