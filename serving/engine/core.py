"""The engine's state and its step: add, schedule, prefill, decode, sample, emit. One thread owns all of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

import numpy as np

from serving.backends.base import FloatArray
from serving.engine.api import (
    EngineStats,
    Event,
    FinishEvent,
    FinishReason,
    Observer,
    PromptEvent,
    RequestRecord,
    StepRecord,
    TokenEvent,
)
from serving.engine.constrained_sequences import ConstrainedSequences
from serving.engine.device_sampler import needs_logits, sample_there
from serving.engine.requests import Continuation, Task
from serving.engine.sampler import Sampled, log_probabilities, sample
from serving.engine.scheduler import Scheduler, Work
from serving.engine.slot_backend import SlotBackend, chooses

_log = logging.getLogger(__name__)


class Core:
    """The running requests of one backend."""

    def __init__(
        self,
        backend: SlotBackend,
        scheduler: Scheduler,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scheduler = scheduler
        self.tasks: dict[Task, None] = {}
        self.stats = EngineStats(backend.slots, 0, 0, 0, backend.slots * backend.max_length)
        self.tokens_per_second = 0.0
        """Moving average of prompt and generated tokens together."""
        self._backend, self._observer, self._clock = backend, observer, clock
        self._choosing = backend if chooses(backend) else None
        self._next_deadline = float("inf")
        self._deaf: list[Task] = []
        self._prompt_tokens = self._cached_tokens = self._made = self._steps = 0
        self._inter_token: list[float] = []
        self._constrained = ConstrainedSequences(scheduler)

    def step(self, arrived: Iterable[Task] = (), cancelled: Iterable[Task] = ()) -> None:
        """Add `arrived`, drop `cancelled`, then run a prefill chunk, a token of every running sequence, or both."""
        began = self._clock()
        self._add(arrived, cancelled, began)
        self._emit(self._constrained.sample_late())
        read, finished = self._read_prompts(began)
        read_at = self._clock()
        owners, logits = self._decode(may_move=not read)
        if logits is not None:
            self._score(owners, logits)
            self._constrained.hold_late(owners, logits)
        sampled = self._sample(owners, logits) + [each for task in finished for each in self._begin(task)]
        self._emit(sampled)
        self._end_step(began, read_at, read, sum(owner is not None for owner in owners))

    def adopt(self, arrived: Iterable[Task]) -> None:
        """Append `arrived` to the waiting queue."""
        for task in arrived:
            self.tasks[task] = None
            self.scheduler.add(task)
            self._next_deadline = min(self._next_deadline, task.deadline or float("inf"))

    def end(self, tasks: Iterable[Task], reason: FinishReason, message: str = "", keep: bool = True) -> None:
        """End the unfinished sequences of `tasks`; without `keep`, the contents of their slots are not reused."""
        for task in list(tasks):
            for continuation in task.continuations:
                if not continuation.ended:
                    self._finish(continuation, reason, message=message, keep=keep)

    def settle(self) -> None:
        """Bring `stats` up to date."""
        table = self.scheduler.table
        used = [slot.filled for slot in table.slots if slot.owner is not None]
        self.stats = EngineStats(
            len(table.slots),
            len(used),
            len(self.scheduler.waiting),
            sum(used),
            self.stats.cache_capacity,
            self._prompt_tokens,
            self._cached_tokens,
            self._made,
            self._steps,
        )

    def close(self) -> None:
        """End the threads that compute masks."""
        self._constrained.close()

    def _add(self, arrived: Iterable[Task], cancelled: Iterable[Task], now: float) -> None:
        self.adopt(arrived)
        deaf, self._deaf = self._deaf, []
        self.end((task for task in (*cancelled, *deaf) if task in self.tasks), "cancelled")
        if now >= self._next_deadline:
            late = [task for task in self.tasks if task.deadline is not None and now >= task.deadline]
            for task in late:
                self.end([task], "timeout", "the request took longer than its time limit")
            rest = (task.deadline for task in self.tasks if task.deadline is not None)
            self._next_deadline = min(rest, default=float("inf"))

    def _read_prompts(self, now: float) -> tuple[int, list[Task]]:
        """Run the scheduled prefill; return the number of tokens, and the requests whose prompt is complete."""
        budget, read, finished = self.scheduler.budget(), 0, []
        while budget > 0 and (work := self.scheduler.next(now, budget)) is not None:
            budget = self.scheduler.left(work, budget)
            try:
                if work.scores:
                    self._score_chunk(work)
                # The logits after a prompt's last token come from a call that gives no others: their last bits differ.
                logits = work.run(self._backend) if not work.scores or (work.ends and work.task.budget) else None
            except Exception as error:
                self._fail([work.task], error)
                continue
            if logits is not None:
                # A copy: the next chunk is written into the same memory.
                work.task.logits = logits.copy()
            read += len(work.tokens)
            if self.scheduler.done(work):
                finished.append(work.task)
        return read, finished

    def _decode(self, may_move: bool) -> tuple[list[Continuation | None], FloatArray | None]:
        """Decode one token of every running sequence; return the sequence of each row, and the logits if fetched."""
        if may_move:
            self._narrow()
        owners, tokens, lengths = self.scheduler.rows()
        if not owners:
            return [], None
        try:
            self._constrained.start(owners)
            logits = None
            if self._choosing is None or needs_logits(owners):
                logits = self._backend.decode(tokens, lengths)
            else:
                self._choosing.advance(tokens, lengths)
        except Exception as error:
            self._fail([owner.task for owner in owners if owner is not None], error)
            return [], None
        self.scheduler.decoded()
        return owners, logits

    def _narrow(self) -> None:
        copies = self.scheduler.narrow()
        if not copies:
            return
        try:
            for copy in copies:
                self._backend.copy_prefix(copy.source.index, copy.target.index, copy.length)
        except Exception:
            # The sequence stays in its slot. The free slot has no prefix that a request could reuse.
            _log.exception("cannot copy a slot of the KV cache")
            self.scheduler.not_moved(copies)
        else:
            self.scheduler.moved(copies)

    def _score_chunk(self, work: Work) -> None:
        """Run a chunk, and keep the log-probabilities of the prompt tokens that follow its tokens."""
        assert work.slot is not None and work.task.scores is not None
        logits = self._backend.score_chunk(work.slot.index, work.tokens, work.start)
        count = work.task.request.prompt_logprobs or 0
        following = work.task.prompt[work.start + 1 : work.start + 1 + len(work.tokens)]
        for line, token in zip(logits, following, strict=False):
            work.task.scores.append(log_probabilities(line, token, count))

    def _score(self, owners: list[Continuation | None], logits: FloatArray) -> None:
        """Keep the log-probabilities of prompt tokens, and remove those rows from `owners`."""
        for row, owner in enumerate(owners):
            if owner is None or not owner.task.scoring:
                continue
            owners[row] = None
            scores, prompt = owner.task.scores, owner.task.prompt
            assert scores is not None
            token = prompt[len(scores)]
            scores.append(log_probabilities(logits[row], token, owner.task.request.prompt_logprobs or 0))
            owner.last = token
            if not owner.task.scoring:
                if owner.task.budget:
                    self.scheduler.scored(owner.task)
                else:
                    self._read(owner.task)

    def _sample(self, owners: list[Continuation | None], logits: FloatArray | None) -> list[Sampled]:
        if not any(owners):
            return []
        if logits is not None:
            return sample(logits, owners)
        assert self._choosing is not None
        try:
            return sample_there(self._choosing, owners)
        except Exception as error:
            self._fail([owner.task for owner in owners if owner is not None], error)
            return []

    def _begin(self, task: Task) -> list[Sampled]:
        """Emit the end of the prefill and sample the first tokens, unless the request wants no output."""
        self._read(task)
        if not task.budget:
            return []
        assert task.logits is not None
        logits = np.repeat(task.logits[None], len(task.continuations), axis=0)
        task.logits = None
        self.scheduler.begin(task)
        return sample(logits, task.continuations)

    def _read(self, task: Task) -> None:
        """Emit the end of the prefill. It ends a request that wants no output."""
        self._prompt_tokens += len(task.prompt)
        self._cached_tokens += task.cached
        self._tell(task, PromptEvent(task.cached, None if task.scores is None else tuple(task.scores)))
        if not task.budget:
            self.end([task], "length")

    def _emit(self, sampled: list[Sampled]) -> None:
        now = self._clock()
        for each in sampled:
            if each.owner.ended:
                continue
            if each.ended:
                self._finish(each.owner, "stop")
            elif each.by_request:
                self._finish(each.owner, "error", message=each.error, by_request=True)
            elif each.error:
                self._fail([each.owner.task], each.error)
            else:
                self._give(each.owner, each, now)

    def _give(self, owner: Continuation, sampled: Sampled, now: float) -> None:
        task, token = owner.task, sampled.token
        owner.last, owner.made = token, owner.made + 1
        task.made += 1
        self._made += 1
        if owner.history is not None:
            owner.history.add(0, token)
        if owner.constraint is not None:
            owner.constraint.accept(token)
        if owner.last_time is not None:
            self._inter_token.append(now - owner.last_time)
        owner.last_time = now
        if task.first_token is None:
            task.first_token = now
        self._tell(task, TokenEvent(owner.index, token, owner.text.push(token), sampled.logprobs))
        if owner.text.stopped:
            self._finish(owner, "stop", owner.text.stopped_by)
        elif token in task.end_ids:
            self._finish(owner, "stop", token)
        elif owner.constraint is not None and owner.constraint.done:
            self._finish(owner, "stop")
        elif owner.made == task.budget:
            self._finish(owner, "length")

    def _finish(
        self,
        owner: Continuation,
        reason: FinishReason,
        stopped_by: str | int | None = None,
        message: str = "",
        keep: bool = True,
        by_request: bool = False,
    ) -> None:
        task = owner.task
        owner.ended = True
        self._constrained.forget(owner)
        self.scheduler.release(owner, keep)
        self._tell(task, FinishEvent(owner.index, reason, owner.text.finish(), stopped_by, message, by_request))
        if not all(each.ended for each in task.continuations):
            return
        del self.tasks[task]
        if self._observer is not None:
            record = RequestRecord(
                task.request.request_id,
                reason,
                len(task.prompt),
                task.cached,
                task.made,
                task.arrived,
                task.scheduled,
                task.first_token,
                self._clock(),
            )
            self._observer.on_finish(record)

    def _fail(self, tasks: Iterable[Task], error: Exception | str) -> None:
        """End `tasks` after an error of the backend."""
        if isinstance(error, Exception):
            _log.error("a step failed", exc_info=error)
            error = f"the model failed: {' '.join(str(error).split())[:300] or type(error).__name__}"
        self.end((task for task in dict.fromkeys(tasks) if task in self.tasks), "error", error, keep=False)

    def _tell(self, task: Task, event: Event) -> None:
        try:
            task.listener(event)
        except Exception:
            # A listener may not raise. Without one, the next step frees the slots.
            _log.exception("a listener failed")
            task.listener = _ignore
            self._deaf.append(task)

    def _end_step(self, began: float, read_at: float, read: int, rows: int) -> None:
        ended = self._clock()
        self.scheduler.stepped(rows, read_at - began, ended - read_at)
        inter_token, self._inter_token = self._inter_token, []
        if read or rows:
            self._steps += 1
            rate = (read + rows) / max(ended - began, 1e-6)
            self.tokens_per_second += (rate - self.tokens_per_second) * (0.1 if self._steps > 1 else 1.0)
            if self._observer is not None:
                self._observer.on_step(StepRecord(rows, read, ended - began, tuple(inter_token)))
        self.settle()


def _ignore(event: Event) -> None:
    """The listener of a request whose own one failed."""
