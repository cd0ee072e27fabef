"""The work of the engine over slots: which streams have slots, what each call of the server gave, how texts end."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from serving.clients.slot_pool import STALE, SlotPool, SlotStream
from serving.clients.tf_serving import TFServingClient
from serving.engine.api import (
    FinishEvent,
    FinishReason,
    GenerationRequest,
    Listener,
    Observer,
    PromptEvent,
    RequestRecord,
    StepRecord,
    TokenEvent,
)
from serving.errors import ServerError

_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 1.0


@dataclass(eq=False)
class Job:
    """A request under way, and its handle."""

    wake: Callable[[], None]
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
        self.wake()

    @property
    def deadline(self) -> float:
        return math.inf if self.request.timeout is None else self.arrived + self.request.timeout


class Rounds:
    """Requests under way over slots, in the hands of the engine's thread.

    Others only look at `jobs`, the pool and the counts, holding `changed`, a condition that each end notifies.
    """

    def __init__(
        self,
        client: TFServingClient,
        slots: int,
        steps: int,
        observer: Observer | None,
        changed: threading.Condition,
    ) -> None:
        self.pool = SlotPool(client.repeat, steps=steps)
        self.jobs: list[Job] = []
        self.prompt_tokens = self.generated = self.steps = 0
        self.seconds = 1.0
        """What a request takes, of late."""
        self._client, self._slots, self._observer, self._changed = client, slots, observer, changed
        self._job_of: dict[SlotStream, Job] = {}
        self._pause, self._ask_at = _FIRST_PAUSE, 0.0

    def enqueue(self, job: Job) -> None:
        """Take `job` into the queue."""
        self.jobs.append(job)
        self.pool.waiting.extend(job.streams)
        self._job_of.update(dict.fromkeys(job.streams, job))

    def has_work(self) -> bool:
        """Whether a round would do something now."""
        due = self.pool.waiting and time.monotonic() >= self._ask_at
        return bool(due or self.pool.running) or any(job.cancelled for job in self.jobs)

    def nap(self) -> float | None:
        """Seconds until something is to be done although nothing happens; None is until something does."""
        times = [job.deadline for job in self.jobs] + ([self._ask_at] if self.pool.waiting else [])
        soonest = min(times, default=math.inf)
        return None if soonest == math.inf else max(0.0, soonest - time.monotonic())

    def end_late(self, end_all: tuple[FinishReason, str] | None) -> None:
        """End what was cancelled and what is late; all of it, as `end_all` says, if it does."""
        now = time.monotonic()
        for job in list(self.jobs):
            left = [stream for stream in job.streams if stream not in job.ended]
            if job.cancelled:
                self._end(left, "cancelled")
            elif end_all is not None:
                self._end(left, *end_all)
            elif now >= job.deadline:
                self._end(left, "timeout", f"not finished within its {job.request.timeout:g} s")

    def round(self) -> None:
        """Give waiting prompts slots if there may be any, and advance all running streams by one call."""
        began = time.monotonic()
        read = self._admit() if self.pool.waiting and began >= self._ask_at else 0
        rows, gaps = len(self.pool.running), list[float]()
        if rows:
            try:
                made = self.pool.decode()
            except ServerError as error:
                self._end(list(self.pool.running), "error", str(error))
            else:
                gaps = self._give(made)
        if not rows and not read:
            return
        with self._changed:
            self.steps += bool(rows)
        if self._observer is not None:
            self._observer.on_step(StepRecord(rows, read, time.monotonic() - began, tuple(gaps)))

    def _admit(self) -> int:
        """Ask for slots for some that wait; return how many prompt tokens were read."""
        rows = self.pool.next_prompts(self._slots - len(self.pool.running))
        if not rows:
            return 0
        placed = self._prefill(rows)
        waits = any(stream in self.pool.waiting for stream in rows)
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
            self.prompt_tokens += read
        self._give(placed)
        return read

    def _prefill(self, rows: Sequence[SlotStream]) -> list[tuple[SlotStream, list[int]]]:
        try:
            return self.pool.prefill(rows)
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
                    self.pool.restart(stream)
                continue
            index = job.streams.index(stream)
            for token, text in stream.take(tokens):
                if stream in job.last_token:
                    gaps.append(now - job.last_token[stream])
                job.last_token[stream] = now
                job.first_token = job.first_token or now
                self.generated += 1
                job.listener(TokenEvent(index, token, text))
            if stream.reason is not None:
                ended[stream] = ""
            elif stream.goes_on:
                self.pool.go_on(stream)
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
        self.pool.leave(streams)
        self._pause, self._ask_at = _FIRST_PAUSE, 0.0
        for stream in streams:
            job = self._job_of.pop(stream)
            job.ended.add(stream)
            why: FinishReason = stream.reason or reason
            index = job.streams.index(stream)
            job.listener(FinishEvent(index, why, stream.text.finish(), stream.stopped_by, message))
            if len(job.ended) == len(job.streams):
                self._close_job(job, why)

    def give_up(self, message: str) -> None:
        """End all requests without another call; their slots' leases end by themselves."""
        self.pool.waiting.clear()
        self.pool.running.clear()
        self._end(list(self._job_of), "error", message)

    def _close_job(self, job: Job, reason: FinishReason) -> None:
        now = time.monotonic()
        with self._changed:
            self.jobs.remove(job)
            self.seconds += 0.2 * (now - job.arrived - self.seconds)
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
