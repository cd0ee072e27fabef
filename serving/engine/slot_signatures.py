"""An engine over the slots of a SavedModel: TensorFlow Serving's by REST or gRPC, or TensorFlow in this process.

One thread owns the slots. Each of its rounds ends what was cancelled or is late, gives waiting prompts slots, and
advances all running streams by one call; docs/slots.md has the protocol and `serving.slots` the client's part of it.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from serving.bundle import Bundle, Geometry
from serving.clients.tf_serving import TFServingClient, Transport
from serving.engine.api import (
    DrainingError,
    EngineStats,
    FinishEvent,
    FinishReason,
    GenerationRequest,
    Listener,
    Observer,
    PromptEvent,
    QueueFullError,
    RequestRecord,
    StepRecord,
    TokenEvent,
)
from serving.errors import InputError, ServerError
from serving.slots import STALE, UNSUPPORTED, SlotPool, SlotStream, check_slot_params
from serving.text_stream import TextStream, TokenBytes, load_tokenizer

DEFAULT_SLOTS = 8
_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 1.0


def open_slot_engine(
    bundle: Bundle,
    transport: Transport,
    *,
    slots: int | None = None,
    steps: int = 1,
    max_waiting: int = 128,
    timeout: float = 60.0,
    retries: int = 4,
    observer: Observer | None = None,
) -> SignatureEngine:
    """Serve `bundle`'s model by the server behind `transport`, which must hold the same model.

    `slots` is how many streams run at once at most, by default what the bundle's recipe exported; `timeout` (seconds)
    and `retries` are a call's, as of `TFServingClient`. Raises InputError if the served model has no slots.
    """
    client = TFServingClient(transport, timeout=timeout, retries=retries)
    if not client.has_slots():
        raise InputError(f"the served model of {bundle.folder} has no slots; export it with export.slots above 0")
    if slots is None:
        exported = bundle.manifest.provenance.recipe.get("export")
        found = exported.get("slots") if isinstance(exported, dict) else None
        slots = found if isinstance(found, int) and found > 0 else DEFAULT_SLOTS
    tokenizer = load_tokenizer(bundle)
    return SignatureEngine(
        client, tokenizer, bundle.manifest.model, slots, steps=steps, max_waiting=max_waiting, observer=observer
    )


@dataclass(eq=False)
class _Job:
    """A request under way, and its handle."""

    engine: SignatureEngine
    request: GenerationRequest
    listener: Listener
    streams: list[SlotStream]
    arrived: float
    cancelled: bool = False
    scheduled: float | None = None
    first_token: float | None = None
    last_token: dict[SlotStream, float] = field(default_factory=dict)
    ended: set[SlotStream] = field(default_factory=set)

    def cancel(self) -> None:
        self.cancelled = True
        self.engine.wake()

    @property
    def deadline(self) -> float:
        return math.inf if self.request.timeout is None else self.arrived + self.request.timeout


class SignatureEngine:
    """Requests over slots; see `serving.engine.api.Engine`.

    A request's end by its timeout or `cancel` takes effect between two calls, so a call that hangs delays it by the
    client's own timeout at most.
    """

    unsupported = UNSUPPORTED | {"logprobs", "prompt_logprobs", "prompt_only"}

    def __init__(
        self,
        client: TFServingClient,
        tokenizer: Tokenizer,
        geometry: Geometry,
        slots: int,
        *,
        steps: int = 1,
        max_waiting: int = 128,
        observer: Observer | None = None,
    ) -> None:
        self.vocab_size, self.n_positions = geometry.vocab_size, geometry.n_positions
        self.eos_token_id, self.tokenizer = geometry.eos_token_id, tokenizer
        self._client, self._slots, self._max_waiting, self._observer = client, slots, max_waiting, observer
        self._token_bytes = TokenBytes(tokenizer)
        self._pool = SlotPool(client.repeat, steps=steps)
        self._changed = threading.Condition()
        self._arrived: list[_Job] = []
        self._jobs: list[_Job] = []
        self._job_of: dict[SlotStream, _Job] = {}
        self._draining = self._closing = False
        self._end_all: tuple[FinishReason, str] | None = None
        self._prompt_tokens = self._generated = self._steps = 0
        self._seconds = 1.0
        self._pause, self._ask_at = _FIRST_PAUSE, 0.0
        self._thread = threading.Thread(target=self._serve, name="slots", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest, listener: Listener) -> _Job:
        """See `Engine.submit`."""
        self._check(request)
        streams = [
            SlotStream(
                request.prompt,
                dataclasses.replace(request.params, seed=request.seed(index)),
                self.eos_token_id,
                lambda: TextStream(self._token_bytes, request.params.stop),
            )
            for index in range(request.n)
        ]
        job = _Job(self, request, listener, streams, time.monotonic())
        with self._changed:
            if self._draining or self._closing:
                raise DrainingError("the engine is shutting down and takes no new requests")
            waiting = self._waiting()
            if waiting >= self._max_waiting:
                retry_after = max(1, math.ceil(self._seconds * waiting / self._slots))
                raise QueueFullError(f"{waiting} requests wait already; try again in {retry_after} s", retry_after)
            self._arrived.append(job)
            self._changed.notify_all()
        return job

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        with self._changed:
            running = list(self._pool.running)
            return EngineStats(
                slots=self._slots,
                active_slots=len(running),
                waiting_requests=self._waiting(),
                cache_tokens=sum(len(stream.prompt) + stream.received for stream in running),
                cache_capacity=self._slots * self.n_positions,
                prompt_tokens=self._prompt_tokens,
                generated_tokens=self._generated,
                steps=self._steps,
            )

    def drain(self, timeout: float) -> bool:
        """See `Engine.drain`."""
        with self._changed:
            self._draining = True
            if self._changed.wait_for(lambda: not self._arrived and not self._jobs, timeout):
                return True
            self._end_all = ("timeout", f"the server stopped before the text was finished, after {timeout:g} s")
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._arrived and not self._jobs)
            return False

    def close(self) -> None:
        """See `Engine.close`."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def wake(self) -> None:
        """Have the engine's thread look at what was cancelled."""
        with self._changed:
            self._changed.notify_all()

    def _waiting(self) -> int:
        return len(self._arrived) + sum(job.scheduled is None for job in self._jobs)

    def _check(self, request: GenerationRequest) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(request, name) is not None:
                raise InputError(f"{name} is not done over slots, which give tokens alone; leave it out")
        if request.prompt_only:
            raise InputError("reading a prompt alone is not done over slots, which give tokens; ask for one token")
        check_slot_params(request.params)
        if request.n > self._slots:
            raise InputError(f"n is {request.n}, but there are {self._slots} slots; ask for fewer")
        if not 1 <= len(request.prompt) < self.n_positions:
            raise InputError(
                f"the prompt has {len(request.prompt)} tokens; it must have from 1 to {self.n_positions - 1}, "
                f"so that one more fits the context of {self.n_positions}"
            )
        outside = next((token for token in request.prompt if not 0 <= token < self.vocab_size), None)
        if outside is not None:
            raise InputError(f"the prompt has the token id {outside}, outside the vocabulary of {self.vocab_size}")

    # All below runs in the engine's thread alone.

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work, self._nap())
                for job in self._arrived:
                    self._jobs.append(job)
                    self._pool.waiting.extend(job.streams)
                    self._job_of.update(dict.fromkeys(job.streams, job))
                self._arrived.clear()
                closing = self._closing
                end_all = self._end_all
            try:
                self._end_late(("cancelled", "") if closing else end_all)
                if not closing:
                    self._round()
            except Exception as error:  # A bug, or a server of another kind: nobody may wait for ever.
                self._give_up(f"internal error: {type(error).__name__}: {error}")
            if closing:
                return

    def _has_work(self) -> bool:
        due = self._pool.waiting and time.monotonic() >= self._ask_at
        ends = self._end_all is not None and self._jobs
        return bool(self._arrived or self._closing or ends or due or self._pool.running) or any(
            job.cancelled for job in self._jobs
        )

    def _nap(self) -> float | None:
        """Seconds until something is to be done although nothing happens; None is until something does."""
        times = [job.deadline for job in self._jobs] + ([self._ask_at] if self._pool.waiting else [])
        soonest = min(times, default=math.inf)
        return None if soonest == math.inf else max(0.0, soonest - time.monotonic())

    def _end_late(self, end_all: tuple[FinishReason, str] | None) -> None:
        now = time.monotonic()
        for job in list(self._jobs):
            left = [stream for stream in job.streams if stream not in job.ended]
            if job.cancelled:
                self._end(left, "cancelled")
            elif end_all is not None:
                self._end(left, *end_all)
            elif now >= job.deadline:
                self._end(left, "timeout", f"not finished within its {job.request.timeout:g} s")

    def _round(self) -> None:
        began = time.monotonic()
        read = self._admit() if self._pool.waiting and began >= self._ask_at else 0
        rows, gaps = len(self._pool.running), list[float]()
        if rows:
            try:
                made = self._pool.decode()
            except ServerError as error:
                self._end(list(self._pool.running), "error", str(error))
            else:
                gaps = self._give(made)
        if not rows and not read:
            return
        with self._changed:
            self._steps += bool(rows)
        if self._observer is not None:
            self._observer.on_step(StepRecord(rows, read, time.monotonic() - began, tuple(gaps)))

    def _admit(self) -> int:
        """Ask for slots for some that wait; return how many prompt tokens were read."""
        rows = self._pool.next_prompts(self._slots - len(self._pool.running))
        if not rows:
            return 0
        placed = self._prefill(rows)
        waits = any(stream in self._pool.waiting for stream in rows)
        # Somebody else's streams have the slots: ask more and more seldom, or when one of ours has ended.
        self._pause = min(2 * self._pause, _LONGEST_PAUSE) if waits and not placed else _FIRST_PAUSE
        self._ask_at = time.monotonic() + self._client.jitter(self._pause) if waits else 0.0
        now = time.monotonic()
        for stream, _ in placed:
            job = self._job_of[stream]
            if job.scheduled is None:
                job.scheduled = now
                job.listener(PromptEvent(cached_tokens=0))
        read = sum(len(stream.prompt) for stream, _ in placed)
        with self._changed:
            self._prompt_tokens += read
        self._give(placed)
        return read

    def _prefill(self, rows: Sequence[SlotStream]) -> list[tuple[SlotStream, list[int]]]:
        try:
            return self._pool.prefill(rows)
        except ServerError as error:
            if error.code == "INVALID_ARGUMENT" and len(rows) > 1:
                # What is wrong with one is not the others' fault.
                return [pair for stream in rows for pair in self._prefill([stream])]
            self._end(rows, "error", str(error))
            return []

    def _give(self, made: Sequence[tuple[SlotStream, list[int]]]) -> list[float]:
        """Tell listeners of new tokens and ends; return seconds between each token and the one before."""
        now, gaps = time.monotonic(), list[float]()
        ended: dict[SlotStream, str] = {}
        for stream, tokens in made:
            job = self._job_of[stream]
            if stream.status == STALE:
                if stream in job.last_token:
                    ended[stream] = "the server no longer has this text's slot; send the request again"
                else:
                    self._pool.restart(stream)
                continue
            index = job.streams.index(stream)
            for token, text in stream.take(tokens):
                if stream in job.last_token:
                    gaps.append(now - job.last_token[stream])
                job.last_token[stream] = now
                job.first_token = job.first_token or now
                self._generated += 1
                job.listener(TokenEvent(index, token, text))
            if stream.reason is not None:
                ended[stream] = ""
            elif stream.goes_on:
                self._pool.go_on(stream)
                self._ask_at = 0.0
        lost = [stream for stream, message in ended.items() if message]
        for stream in lost:
            self._end([stream], "error", ended[stream])
        self._end([stream for stream in ended if stream not in lost])
        return gaps

    def _end(self, streams: Sequence[SlotStream], reason: FinishReason = "error", message: str = "") -> None:
        """Give the slots of `streams` back and say why each ended: its own reason, or the one given."""
        if not streams:
            return
        self._pool.leave(streams)
        self._pause, self._ask_at = _FIRST_PAUSE, 0.0
        for stream in streams:
            job = self._job_of.pop(stream)
            job.ended.add(stream)
            why: FinishReason = stream.reason or reason
            index = job.streams.index(stream)
            job.listener(FinishEvent(index, why, stream.text.finish(), stream.stopped_by, message))
            if len(job.ended) == len(job.streams):
                self._close_job(job, why)

    def _give_up(self, message: str) -> None:
        """End all requests without another call; their slots' leases end by themselves."""
        self._pool.waiting.clear()
        self._pool.running.clear()
        self._end(list(self._job_of), "error", message)

    def _close_job(self, job: _Job, reason: FinishReason) -> None:
        now = time.monotonic()
        with self._changed:
            self._jobs.remove(job)
            self._seconds += 0.2 * (now - job.arrived - self._seconds)
            self._changed.notify_all()
        if self._observer is not None:
            self._observer.on_finish(
                RequestRecord(
                    job.request.request_id,
                    reason,
                    len(job.request.prompt),
                    0,
                    sum(len(stream.tokens) for stream in job.streams),
                    job.arrived,
                    job.scheduled,
                    job.first_token,
                    now,
                )
            )
