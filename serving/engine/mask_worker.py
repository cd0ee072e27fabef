"""Computes which tokens grammars allow while the model runs its step, in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable

from serving.sampling.constraints import TokenConstraint

SLOW = 0.005
"""Seconds from which on a mask is slow: those of its sequence are then computed by another thread."""


class MaskWorker:
    """Two threads, begun when they are first needed: one for quick grammars, and one for those that were slow once.

    A grammar that takes long therefore delays no sequence but its own, and others that are slow.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._quick: deque[TokenConstraint] = deque()
        self._slow: deque[TokenConstraint] = deque()
        self._threads: list[threading.Thread] = []
        self._closed = False

    def start(self, constraints: Iterable[TokenConstraint]) -> None:
        """Compute the masks of those of `constraints` that are not ready; nobody may use them before they are."""
        waiting = [each for each in constraints if not each.ready]
        if not waiting:
            return
        if not self._threads:
            for queue in (self._quick, self._slow):
                thread = threading.Thread(target=self._run, args=(queue,), name="masks", daemon=True)
                self._threads.append(thread)
                thread.start()
        with self._changed:
            for each in waiting:
                (self._slow if each.slow else self._quick).append(each)
            self._changed.notify_all()

    def wait(self, constraints: Iterable[TokenConstraint], timeout: float, every: bool = True) -> None:
        """Wait until all of `constraints` are ready, or without `every` one of them, for `timeout` seconds at most."""
        pending = list(constraints)
        ready = all if every else any
        if not pending or ready(each.ready for each in pending):
            return
        with self._changed:
            self._changed.wait_for(lambda: ready(each.ready for each in pending), timeout)

    def close(self) -> None:
        """End the threads, each after the mask that it computes."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self, queue: deque[TokenConstraint]) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: queue or self._closed)
                if self._closed:
                    return
                constraint = queue.popleft()
            began = time.perf_counter()
            constraint.compute()
            constraint.slow = constraint.slow or time.perf_counter() - began > SLOW
            with self._changed:
                if not queue or queue is self._slow:
                    self._changed.notify_all()
