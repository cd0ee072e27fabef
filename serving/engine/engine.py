"""Continuous batching in one thread, which owns all state; other threads queue requests and get callbacks."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from tokenizers import Tokenizer

from serving.backends.base import NextTokens
from serving.backends.devices import parse_device
from serving.backends.loader import runtime_errors
from serving.backends.prefill_graph import find_prefill_graph
from serving.backends.verify_steps import speculates
from serving.bundle import Bundle
from serving.engine.api import DrainingError, EngineStats, GenerationRequest, Listener, Observer, QueueFullError
from serving.engine.config import SHARED_CHUNK, EngineConfig
from serving.engine.core import Core
from serving.engine.prefill_budget import PrefillBudget, TimedPrefillBudget
from serving.engine.requests import EngineRequest, open_engine_request
from serving.engine.scheduler import Scheduler
from serving.engine.slot_backend import SlotBackend
from serving.errors import InputError
from serving.generation import token_budget
from serving.generation.ngram_table import load_ngram_table
from serving.sampling.detokenizer import TokenBytes, load_tokenizer

_LONGEST_RETRY = 60

_log = logging.getLogger(__name__)


def open_engine(
    bundle: Bundle,
    graph: str | None = None,
    device: str = "cpu",
    config: EngineConfig | None = None,
    observer: Observer | None = None,
) -> SlotEngine:
    """Load `graph` ("ort/fp32" if None) of `bundle` on `device`, "cpu", "cuda" or "cuda:N", and start its engine.

    Raises InputError, BundleError and RuntimeMissingError as `load_backend` does.
    """
    parse_device(device)
    config = config or EngineConfig()
    geometry = bundle.manifest.model
    graph = graph or "ort/fp32"
    prefill_graph = find_prefill_graph(bundle, graph, config.prefill_graph, device)
    if prefill_graph is not None:
        _log.info("%s prefills the prompts of %s; --prefill-graph same saves its memory", prefill_graph, graph)
    with runtime_errors("onnx"):
        from serving.engine.onnx_slot_backend import OnnxSlotBackend

        backend = OnnxSlotBackend(
            bundle,
            graph,
            slots=config.slots,
            max_length=config.length(geometry.n_positions),
            threads=config.threads,
            device=device,
            speculation=speculates(bundle, graph, config.speculation),
            prefill_graph=prefill_graph,
        )
    table = load_ngram_table(bundle) if backend.verify_step is not None else None
    return SlotEngine(backend, load_tokenizer(bundle), geometry.eos_token_id, config, observer, table=table)


class SlotEngine:
    """An `Engine` over a `SlotBackend`, which it owns from here on.

    Args:
        backend, tokenizer, eos_token_id: the model; its slots and their length are the backend's.
        config: the settings that the backend does not have already.
        observer: called after each step and each request, in the engine's thread.
        start: whether to start the thread; if not, the caller calls `step`, as tests do.
        table: likely next tokens, for drafts.
    """

    unsupported: frozenset[str] = frozenset()

    def __init__(
        self,
        backend: SlotBackend,
        tokenizer: Tokenizer,
        eos_token_id: int,
        config: EngineConfig | None = None,
        observer: Observer | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        start: bool = True,
        table: NextTokens | None = None,
    ) -> None:
        self.config = config or EngineConfig()
        self.vocab_size, self.n_positions = backend.vocab_size, backend.max_length
        self.eos_token_id, self.tokenizer = eos_token_id, tokenizer
        self._token_bytes = TokenBytes(tokenizer)
        self._backend, self._clock = backend, clock
        speculate = self.config.speculation != "off"
        self._core = Core(backend, _scheduler(backend, self.config), observer, clock, speculate, table)
        # Guards the attributes below. The thread waits on it for work, and `drain` for the end of all work.
        self._changed = threading.Condition()
        self._inbox: deque[EngineRequest] = deque()
        self._cancelled: deque[EngineRequest] = deque()
        self._draining = self._expire = self._closing = self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True) if start else None
        if self._thread is not None:
            self._thread.start()

    def submit(self, request: GenerationRequest, listener: Listener) -> _Handle:
        """See `Engine.submit`."""
        self._check(request)
        budget = token_budget(
            "the prompt", request.prompt, request.params, self.vocab_size, self.n_positions, request.prompt_only
        )
        timeout = self.config.default_timeout if request.timeout is None else request.timeout
        engine_request = open_engine_request(
            request, listener, self._clock(), timeout, budget, self.eos_token_id, self._token_bytes
        )
        with self._changed:
            if self._draining:
                raise DrainingError("the server is stopping and takes no new requests; ask another one")
            stats = self._core.stats
            waiting = len(self._inbox) + stats.waiting_requests
            room = self.config.queue_limit + stats.slots - stats.active_slots
            if waiting >= room and not request.joins_call:
                raise QueueFullError(f"{waiting} requests are waiting already; try again later", self._retry_after())
            self._inbox.append(engine_request)
            self._changed.notify_all()
        return _Handle(self, engine_request)

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        with self._changed:
            stats = self._core.stats
            return replace(stats, waiting_requests=stats.waiting_requests + len(self._inbox))

    def drain(self, timeout: float) -> bool:
        """See `Engine.drain`."""
        with self._changed:
            self._draining = True
            if self._changed.wait_for(lambda: self._idle, timeout):
                return True
            self._expire = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._idle)
            return False

    def close(self) -> None:
        """See `Engine.close`."""
        with self._changed:
            self._draining = self._closing = True
            self._changed.notify_all()
        if self._thread is None:
            self._end()
        elif threading.current_thread() is not self._thread:
            self._thread.join()

    def step(self) -> bool:
        """Run one step; return False if there was nothing to do."""
        with self._changed:
            arrived, self._inbox = self._inbox, deque()
            cancelled, self._cancelled = self._cancelled, deque()
            expire, self._expire = self._expire, False
            if not (arrived or cancelled or expire or self._core.requests):
                return False
            # The core does not count these requests yet.
            stats = self._core.stats
            self._core.stats = replace(stats, waiting_requests=stats.waiting_requests + len(arrived))
        try:
            self._core.step(arrived, cancelled)
        except Exception:
            # Every request needs an end: a dead thread would leave its clients waiting.
            _log.exception("the engine failed")
            self._core.end(self._core.requests, "error", "the engine failed; look into its log", keep=False)
        if expire:
            self._core.end(self._core.requests, "timeout", "the server was stopping and waited no longer")
        with self._changed:
            self._core.update_stats()
            self._changed.notify_all()
        return True

    def cancel(self, engine_request: EngineRequest) -> None:
        """End `engine_request` with "cancelled" in the next step."""
        with self._changed:
            self._cancelled.append(engine_request)
            self._changed.notify_all()

    @property
    def _idle(self) -> bool:
        return self._closed or not (self._inbox or self._core.requests)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closing or self._expire or self._inbox or self._cancelled or self._core.requests
                )
                if self._closing:
                    break
            self.step()
        self._end()

    def _end(self) -> None:
        """Cancel the running requests and release the backend, in the thread that owns it."""
        with self._changed:
            if self._closed:
                return
            arrived, self._inbox = self._inbox, deque()
        self._core.enqueue(arrived)
        self._core.end(self._core.requests, "cancelled")
        with self._changed:
            self._core.update_stats()
            self._closed = True
            self._changed.notify_all()
        self._core.close()
        self._backend.close()

    def _check(self, request: GenerationRequest) -> None:
        slots = self._core.stats.slots
        if request.n > slots:
            raise InputError(f"n is {request.n}, but this server decodes {slots} sequences at once; ask for fewer")

    def _retry_after(self) -> int:
        """Estimated seconds until the present queue is empty, at the present rate."""
        rate = self._core.tokens_per_second
        seconds = self._core.scheduler.backlog / rate if rate > 0 else 1
        return min(max(1, math.ceil(seconds)), _LONGEST_RETRY)


def _scheduler(backend: SlotBackend, config: EngineConfig) -> Scheduler:
    chunk, budget = config.prefill_chunk, config.max_num_batched_tokens
    prefill_budget = PrefillBudget(chunk) if chunk else TimedPrefillBudget(config.prefill_slowdown, budget)
    return Scheduler(backend, min(chunk or SHARED_CHUNK, SHARED_CHUNK), budget, prefill_budget, config.prefix_cache)


class _Handle:
    """See `serving.engine.api.Handle`."""

    def __init__(self, engine: SlotEngine, engine_request: EngineRequest) -> None:
        self._engine, self._engine_request = engine, engine_request

    def cancel(self) -> None:
        """See `Handle.cancel`."""
        self._engine.cancel(self._engine_request)
