"""An `Engine` over the closed form, small enough to see that it is right, whose pace a test decides."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from serving.bundle import Bundle, Manifest, open_bundle
from serving.engine.api import (
    DrainingError,
    EngineStats,
    Event,
    FinishEvent,
    FinishReason,
    GenerationRequest,
    Logprobs,
    Observer,
    PromptEvent,
    QueueFullError,
    RequestRecord,
    StepRecord,
    TokenEvent,
)
from serving.errors import InputError
from serving.sampling.detokenizer import TextStream, TokenBytes
from serving.server.registry import ModelRegistry, ServedModel, State
from tests.closed_form import byte_tokenizer, logits_after, next_token, write_bundle


@dataclass
class Row:
    """One continuation."""

    request: Running
    index: int
    tokens: list[int]
    text: TextStream
    count: int = 0


@dataclass(eq=False)
class Running:
    """One request; a Handle."""

    request: GenerationRequest
    listener: Callable[[Event], None]
    arrived: float
    rows: list[Row] = field(default_factory=list)
    generated: int = 0
    first: float | None = None
    cancelled: bool = False
    reason: FinishReason = "length"

    def cancel(self) -> None:
        self.cancelled = True


class DoubleEngine:
    """Greedy only: the text of `tests.closed_form.greedy`. A step takes `pace` seconds; `paused` stops stepping."""

    def __init__(self, slots: int = 4, queue: int = 8, pace: float = 0.0, observer: Observer | None = None) -> None:
        self.vocab_size, self.n_positions, self.eos_token_id = 257, 1024, 256
        self.tokenizer = byte_tokenizer()
        self.unsupported: frozenset[str] = frozenset()
        self.slots, self.queue, self.pace, self.observer = slots, queue, pace, observer
        self.paused = threading.Event()
        self.broken: str | None = None
        self._names = TokenBytes(self.tokenizer)
        self._lock = threading.Condition()
        self._waiting: list[Running] = []
        self._rows: list[Row] = []
        self._draining = self._closed = False
        self.generated = self.steps = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest, listener: Callable[[Event], None]) -> Running:
        if request.logprobs is not None and "logprobs" in self.unsupported:
            raise InputError("logprobs is not done here; leave it out")
        if any(not 0 <= token < self.vocab_size for token in request.prompt):
            raise InputError(f"a prompt has a token outside the vocabulary of {self.vocab_size}")
        if len(request.prompt) + (not request.prompt_only) > self.n_positions:
            raise InputError(f"the prompt does not fit the context of {self.n_positions}")
        if request.n > self.slots:
            raise InputError(f"n is {request.n}, but the engine has {self.slots} slots")
        with self._lock:
            if self._draining:
                raise DrainingError("the engine takes nothing new")
            if len(self._waiting) >= self.queue and not request.joins_call:
                raise QueueFullError("the queue is full; try again in 1 s", 1)
            running = Running(request, listener, time.monotonic())
            self._waiting.append(running)
            self._lock.notify_all()
            return running

    def stats(self) -> EngineStats:
        with self._lock:
            used = sum(len(row.tokens) for row in self._rows)
            return EngineStats(
                self.slots,
                len(self._rows),
                len(self._waiting),
                used,
                self.slots * self.n_positions,
                generated_tokens=self.generated,
                steps=self.steps,
            )

    def drain(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        with self._lock:
            self._draining = True
            self._lock.wait_for(lambda: not self._rows and not self._waiting, timeout)
            left = bool(self._rows or self._waiting)
        if left:
            self._end_all("timeout")
        return not left and time.monotonic() < deadline + 1

    def close(self) -> None:
        with self._lock:
            self._closed = self._draining = True
            self._lock.notify_all()
        self._end_all("cancelled")
        self._thread.join(5)

    def _end_all(self, reason: FinishReason) -> None:
        with self._lock:
            for running in self._waiting:
                self._open(running)
            self._waiting.clear()
            for row in list(self._rows):
                self._finish(row, reason)

    def _run(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._closed or self._rows or self._waiting)
                if self._closed:
                    return
                if not self.paused.is_set():
                    self._step()
                else:
                    self._reap()
            time.sleep(max(self.pace, 0.0005 if self.paused.is_set() else 0))

    def _reap(self) -> None:
        for running in [each for each in self._waiting if each.cancelled]:
            self._waiting.remove(running)
            self._open(running)
        for row in [row for row in self._rows if row.request.cancelled]:
            self._finish(row, "cancelled")
        now = time.monotonic()
        for row in list(self._rows):
            limit = row.request.request.timeout
            if limit is not None and now > row.request.arrived + limit:
                self._finish(row, "timeout")

    def _open(self, running: Running) -> None:
        request = running.request
        running.rows = [
            Row(running, index, list(request.prompt), TextStream(self._names, request.params.stop))
            for index in range(request.n)
        ]
        self._rows += running.rows

    def _step(self) -> None:
        began = time.monotonic()
        self._reap()
        while self._waiting and len(self._rows) + self._waiting[0].request.n <= self.slots:
            running = self._waiting.pop(0)
            self._open(running)
            running.listener(PromptEvent(0, self._prompt_logprobs(running.request)))
            if running.request.prompt_only:
                for row in list(running.rows):
                    self._finish(row, "length")
        rows = list(self._rows)
        for row in rows:
            self._advance(row)
        self.steps += 1
        if self.observer is not None and rows:
            self.observer.on_step(StepRecord(len(rows), 0, time.monotonic() - began, (0.001,) * len(rows)))
        self._lock.notify_all()

    def _logprobs(self, tokens: list[int], token: int, top: int | None) -> Logprobs | None:
        if top is None:
            return None
        logits = logits_after(tokens, self.vocab_size).tolist()
        best = sorted(range(self.vocab_size), key=lambda id: -logits[id])[:top]
        rank = sum(logit >= logits[token] for logit in logits)
        return Logprobs(logits[token], tuple((id, logits[id]) for id in best), rank)

    def _prompt_logprobs(self, request: GenerationRequest) -> tuple[Logprobs | None, ...] | None:
        if request.prompt_logprobs is None:
            return None
        ids = list(request.prompt)
        rest = [self._logprobs(ids[:at], ids[at], request.prompt_logprobs) for at in range(1, len(ids))]
        return (None, *rest)

    def _advance(self, row: Row) -> None:
        running, params = row.request, row.request.request.params
        if self.broken is not None:
            self._finish(row, "error", message=self.broken)
            return
        token = next_token(row.tokens, self.vocab_size)
        scores = self._logprobs(row.tokens, token, running.request.logprobs)
        row.tokens.append(token)
        row.count += 1
        running.generated += 1
        self.generated += 1
        running.first = running.first or time.monotonic()
        running.listener(TokenEvent(row.index, token, row.text.push(token), scores))
        if row.text.stopped:
            self._finish(row, "stop", stopped_by=params.stop[0])
        elif (token == self.eos_token_id and not params.ignore_eos) or token in params.stop_token_ids:
            self._finish(row, "stop", stopped_by=token)
        elif row.count >= params.max_new_tokens or len(row.tokens) >= self.n_positions:
            self._finish(row, "length")

    def _finish(self, row: Row, reason: FinishReason, stopped_by: str | int | None = None, message: str = "") -> None:
        self._rows.remove(row)
        running = row.request
        running.reason = reason
        text = "" if reason == "cancelled" else row.text.finish()
        running.listener(FinishEvent(row.index, reason, text, stopped_by, message))
        if self.observer is not None and not any(other.request is running for other in self._rows):
            request, now = running.request, time.monotonic()
            self.observer.on_finish(
                RequestRecord(
                    request.request_id,
                    reason,
                    len(request.prompt),
                    0,
                    running.generated,
                    running.arrived,
                    running.arrived,
                    running.first,
                    now,
                )
            )
        self._lock.notify_all()


def bundle_of(folder: Path, name: str, extra: Mapping[str, bytes] | None = None) -> Bundle:
    """A small bundle with `extra` files in `folder`, written if it is not there."""
    if not folder.exists():
        folder.mkdir(parents=True)
        manifest: Manifest = write_bundle(folder, name, extra)
        return Bundle(folder, manifest)
    return open_bundle(folder)


def registry_of(
    engine: DoubleEngine,
    folder: Path,
    name: str = "tiny",
    version: int = 1,
    extra: Mapping[str, bytes] | None = None,
) -> ModelRegistry:
    """A registry with one available model, whose bundle has `extra` files."""
    registry = ModelRegistry()
    registry.add(ServedModel(name, version, bundle_of(folder, name, extra), engine, 1_700_000_000, State.AVAILABLE))
    return registry
