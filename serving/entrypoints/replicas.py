"""Several engines of one model as one: each request goes to the one with the least to do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

from serving.engine.api import (
    Engine,
    EngineStats,
    Event,
    FinishEvent,
    GenerationRequest,
    Handle,
    Listener,
    QueueFullError,
)
from serving.errors import InputError


class Replicas:
    """An `Engine` over `engines` of the same model.

    The load of an engine is the continuations that it has and has not ended, counted here: its own counts are those of
    its last step, and several requests may come between two steps.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        if not engines:
            raise InputError("there are no engines; start at least one replica")
        self.engines = tuple(engines)
        first = self.engines[0]
        self.vocab_size, self.n_positions = first.vocab_size, first.n_positions
        self.eos_token_id, self.tokenizer = first.eos_token_id, first.tokenizer
        self.unsupported = frozenset().union(*(engine.unsupported for engine in self.engines))
        self._load = [0] * len(self.engines)
        self._lock = threading.Lock()

    def submit(self, request: GenerationRequest, listener: Listener) -> Handle:
        """Submit to the least loaded engine, or to the next one while queues are full. Raises what `Engine` says."""
        with self._lock:
            order = sorted(range(len(self.engines)), key=self._load.__getitem__)
        full: QueueFullError | None = None
        for index in order:
            self._add(index, request.n)
            try:
                return self.engines[index].submit(request, self._counting(index, listener))
            except QueueFullError as error:
                self._add(index, -request.n)
                full = error
            except BaseException:
                self._add(index, -request.n)
                raise
        assert full is not None
        raise full

    def _counting(self, index: int, listener: Listener) -> Callable[[Event], None]:
        def listen(event: Event) -> None:
            if type(event) is FinishEvent:
                self._add(index, -1)
            listener(event)

        return listen

    def _add(self, index: int, continuations: int) -> None:
        with self._lock:
            self._load[index] += continuations

    def stats(self) -> EngineStats:
        """The sums over all engines."""
        each = [engine.stats() for engine in self.engines]
        return EngineStats(
            **{field.name: sum(getattr(one, field.name) for one in each) for field in fields(EngineStats)}
        )

    def drain(self, timeout: float) -> bool:
        """Drain all at once; True if all ended in time."""
        with ThreadPoolExecutor(len(self.engines)) as pool:
            return all(list(pool.map(lambda engine: engine.drain(timeout), self.engines)))

    def close(self) -> None:
        """Close all."""
        for engine in self.engines:
            engine.close()
