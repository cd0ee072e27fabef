"""The engine's state and its step: add, schedule, prefill, decode, sample, emit. One thread owns all of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

import numpy as np

from serving.backends.base import FloatArray, NextTokens
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
from serving.engine.device_sampler import needs_logits, sample_on_device
from serving.engine.requests import EngineRequest, EngineSequence
from serving.engine.sampler import Sampled, log_probabilities, sample
from serving.engine.scheduler import ScheduledPrefill, Scheduler
from serving.engine.slot_backend import SlotBackend, supports_device_sampling
from serving.engine.speculation import Speculation
from serving.generation.drafts import Draft

_log = logging.getLogger(__name__)


class Core:
    """The running requests of one backend."""

    def __init__(
        self,
        backend: SlotBackend,
        scheduler: Scheduler,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
        speculate: bool = False,
        table: NextTokens | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.requests: dict[EngineRequest, None] = {}
        self.stats = EngineStats(backend.slots, 0, 0, 0, backend.slots * backend.max_length)
        self.tokens_per_second = 0.0
        """Moving average of prompt and generated tokens together."""
        self._backend, self._observer, self._clock = backend, observer, clock
        self._device_sampling = backend if supports_device_sampling(backend) else None
        self._next_deadline = float("inf")
        self._disconnected: list[EngineRequest] = []
        self._prompt_tokens = self._cached_tokens = self._num_generated = self._steps = 0
        self._inter_token: list[float] = []
        self._constrained = ConstrainedSequences(scheduler)
        self._speculation = Speculation(backend, scheduler, speculate, table, clock)

    def step(self, arrived: Iterable[EngineRequest] = (), cancelled: Iterable[EngineRequest] = ()) -> None:
        """Add `arrived`, drop `cancelled`, then run a prefill chunk, a token of every running sequence, or both.

        A sequence that runs alone may get several tokens, from one step that verifies a draft.
        """
        began = self._clock()
        self._add(arrived, cancelled, began)
        self._emit_sampled(self._constrained.sample_late())
        num_prefilled, finished = self._prefill(began)
        prefilled_at = self._clock()
        if not num_prefilled and not finished:
            self._compact()
            if (drafted := self._speculation.draft()) is not None:
                self._verify(*drafted)
                self._end_step(began, prefilled_at, 0, 1 + len(drafted[1].tokens))
                return
        sequences, logits = self._decode()
        if logits is not None:
            self._score(sequences, logits)
            self._speculation.hold_replaying(sequences)
            self._constrained.hold_late(sequences, logits)
        sampled = self._sample(sequences, logits) + [each for request in finished for each in self._begin(request)]
        self._emit_sampled(sampled)
        if not num_prefilled:
            self._speculation.on_plain()
        self._end_step(began, prefilled_at, num_prefilled, sum(sequence is not None for sequence in sequences))

    def enqueue(self, arrived: Iterable[EngineRequest]) -> None:
        """Append `arrived` to the waiting queue."""
        for request in arrived:
            self.requests[request] = None
            self.scheduler.add(request)
            self._next_deadline = min(self._next_deadline, request.deadline or float("inf"))

    def end(
        self, requests: Iterable[EngineRequest], reason: FinishReason, message: str = "", keep: bool = True
    ) -> None:
        """End the unfinished sequences of `requests`; without `keep`, the contents of their slots are not reused."""
        for request in list(requests):
            for sequence in request.sequences:
                if not sequence.ended:
                    self._finish(sequence, reason, message=message, keep=keep)

    def update_stats(self) -> None:
        """Bring `stats` up to date."""
        table = self.scheduler.table
        used = [slot.filled for slot in table.slots if slot.sequence is not None]
        self.stats = EngineStats(
            len(table.slots),
            len(used),
            len(self.scheduler.waiting),
            sum(used),
            self.stats.cache_capacity,
            self._prompt_tokens,
            self._cached_tokens,
            self._num_generated,
            self._steps,
            **self._speculation.totals(),
        )

    def close(self) -> None:
        """End the threads that compute masks."""
        self._constrained.close()

    def _add(self, arrived: Iterable[EngineRequest], cancelled: Iterable[EngineRequest], now: float) -> None:
        self.enqueue(arrived)
        disconnected, self._disconnected = self._disconnected, []
        self.end((request for request in (*cancelled, *disconnected) if request in self.requests), "cancelled")
        if now >= self._next_deadline:
            late = [request for request in self.requests if request.deadline is not None and now >= request.deadline]
            for request in late:
                self.end([request], "timeout", "the request took longer than its time limit")
            rest = (request.deadline for request in self.requests if request.deadline is not None)
            self._next_deadline = min(rest, default=float("inf"))

    def _prefill(self, now: float) -> tuple[int, list[EngineRequest]]:
        """Run the scheduled prefill; return the number of tokens, and the requests whose prompt is complete."""
        budget, num_prefilled, finished = self.scheduler.budget(), 0, []
        while budget > 0 and (prefill := self.scheduler.next(now, budget)) is not None:
            budget = self.scheduler.left(prefill, budget)
            try:
                if prefill.scores:
                    self._score_chunk(prefill)
                # The logits after a prompt's last token come from a call that gives no others: their last bits differ.
                logits = (
                    prefill.run(self._backend)
                    if not prefill.scores or (prefill.ends and prefill.request.max_new_tokens)
                    else None
                )
            except Exception as error:
                self._fail([prefill.request], error)
                continue
            if logits is not None:
                # A copy: the next chunk is written into the same memory.
                prefill.request.logits = logits.copy()
            num_prefilled += len(prefill.tokens)
            if self.scheduler.on_chunk_done(prefill):
                finished.append(prefill.request)
        return num_prefilled, finished

    def _decode(self) -> tuple[list[EngineSequence | None], FloatArray | None]:
        """Decode one token of every running sequence; return the sequence of each row, and the logits if fetched."""
        sequences, tokens, lengths = self.scheduler.rows()
        if not sequences:
            return [], None
        try:
            self._constrained.start(sequences)
            logits = None
            if self._device_sampling is None or needs_logits(sequences):
                logits = self._backend.decode(tokens, lengths)
            else:
                self._device_sampling.advance(tokens, lengths)
        except Exception as error:
            self._fail([sequence.request for sequence in sequences if sequence is not None], error)
            return [], None
        self.scheduler.on_decode_done()
        return sequences, logits

    def _verify(self, sequence: EngineSequence, draft: Draft) -> None:
        """Decode the newest token of `sequence` and its `draft` in one step; emit the tokens that it certainly gets."""
        slot = sequence.slot
        assert slot is not None
        fed = (sequence.last_token, *draft.tokens)
        try:
            logits = self._backend.verify(slot.index, fed, slot.filled)
        except Exception as error:
            self._fail([sequence.request], error)
            return
        verified, accepted, emitted = self._clock(), 0, 0
        for row, drafted in enumerate((*draft.tokens, None)):
            sampled = sample(logits[row : row + 1], [sequence])
            if not self._speculation.certain(sequence, logits[row], sampled[0].token):
                break
            self._speculation.on_accepted(sequence, slot.filled)
            slot.filled += 1
            emitted += 1
            self._emit_sampled(sampled)
            if sequence.ended or sampled[0].token != drafted:
                break
            accepted += 1
        self._speculation.on_verified(draft, accepted, emitted, verified)

    def _compact(self) -> None:
        copies = self.scheduler.compact()
        if not copies:
            return
        try:
            for copy in copies:
                self._backend.copy_prefix(copy.source.index, copy.target.index, copy.length)
        except Exception:
            # The sequence stays in its slot. The free slot has no prefix that a request could reuse.
            _log.exception("cannot copy a slot of the KV cache")
            self.scheduler.not_compacted(copies)
        else:
            self.scheduler.compacted(copies)

    def _score_chunk(self, prefill: ScheduledPrefill) -> None:
        """Run a chunk, and keep the log-probabilities of the prompt tokens that follow its tokens."""
        assert prefill.slot is not None and prefill.request.scores is not None
        logits = self._backend.score_chunk(prefill.slot.index, prefill.tokens, prefill.start)
        count = prefill.request.submitted.prompt_logprobs or 0
        following = prefill.request.prompt[prefill.start + 1 : prefill.start + 1 + len(prefill.tokens)]
        for line, token in zip(logits, following, strict=False):
            prefill.request.scores.append(log_probabilities(line, token, count))

    def _score(self, sequences: list[EngineSequence | None], logits: FloatArray) -> None:
        """Keep the log-probabilities of prompt tokens, and remove those rows from `sequences`."""
        for row, sequence in enumerate(sequences):
            if sequence is None or not sequence.request.scoring:
                continue
            sequences[row] = None
            scores, prompt = sequence.request.scores, sequence.request.prompt
            assert scores is not None
            token = prompt[len(scores)]
            scores.append(log_probabilities(logits[row], token, sequence.request.submitted.prompt_logprobs or 0))
            sequence.last_token = token
            if not sequence.request.scoring:
                if sequence.request.max_new_tokens:
                    self.scheduler.on_scored(sequence.request)
                else:
                    self._end_prefill(sequence.request)

    def _sample(self, sequences: list[EngineSequence | None], logits: FloatArray | None) -> list[Sampled]:
        if not any(sequences):
            return []
        if logits is not None:
            return [
                each
                for each in sample(logits, sequences)
                if not self._speculation.inexact(each.sequence) or self._certain(each, logits)
            ]
        assert self._device_sampling is not None
        try:
            return sample_on_device(self._device_sampling, sequences)
        except Exception as error:
            self._fail([sequence.request for sequence in sequences if sequence is not None], error)
            return []

    def _certain(self, sampled: Sampled, logits: FloatArray) -> bool:
        slot = sampled.sequence.slot
        assert slot is not None
        return self._speculation.certain(sampled.sequence, logits[slot.index], sampled.token)

    def _begin(self, request: EngineRequest) -> list[Sampled]:
        """Emit the end of the prefill and sample the first tokens, unless the request wants no output."""
        self._end_prefill(request)
        if not request.max_new_tokens:
            return []
        assert request.logits is not None
        logits = np.repeat(request.logits[None], len(request.sequences), axis=0)
        request.logits = None
        self.scheduler.begin(request)
        return sample(logits, request.sequences)

    def _end_prefill(self, request: EngineRequest) -> None:
        """Emit the end of the prefill. It ends a request that wants no output."""
        self._prompt_tokens += len(request.prompt)
        self._cached_tokens += request.cached
        self._emit(request, PromptEvent(request.cached, None if request.scores is None else tuple(request.scores)))
        if not request.max_new_tokens:
            self.end([request], "length")

    def _emit_sampled(self, sampled: list[Sampled]) -> None:
        now = self._clock()
        for each in sampled:
            if each.sequence.ended:
                continue
            if each.ended:
                self._finish(each.sequence, "stop")
            elif each.by_request:
                self._finish(each.sequence, "error", message=each.error, by_request=True)
            elif each.error:
                self._fail([each.sequence.request], each.error)
            else:
                self._append_token(each.sequence, each, now)

    def _append_token(self, sequence: EngineSequence, sampled: Sampled, now: float) -> None:
        request, token = sequence.request, sampled.token
        sequence.last_token, sequence.num_generated = token, sequence.num_generated + 1
        sequence.tokens.append(token)
        request.num_generated += 1
        self._num_generated += 1
        if sequence.penalty_state is not None:
            sequence.penalty_state.add(0, token)
        if sequence.constraint is not None:
            sequence.constraint.accept(token)
        if sequence.last_time is not None:
            self._inter_token.append(now - sequence.last_time)
        sequence.last_time = now
        if request.first_token is None:
            request.first_token = now
        self._emit(request, TokenEvent(sequence.index, token, sequence.text.push(token), sampled.logprobs))
        if sequence.text.stopped:
            self._finish(sequence, "stop", sequence.text.stopped_by)
        elif token in request.end_ids:
            self._finish(sequence, "stop", token)
        elif sequence.constraint is not None and sequence.constraint.done:
            self._finish(sequence, "stop")
        elif sequence.num_generated == request.max_new_tokens:
            self._finish(sequence, "length")

    def _finish(
        self,
        sequence: EngineSequence,
        reason: FinishReason,
        stopped_by: str | int | None = None,
        message: str = "",
        keep: bool = True,
        by_request: bool = False,
    ) -> None:
        request = sequence.request
        sequence.ended = True
        self._constrained.forget(sequence)
        self.scheduler.release(sequence, keep)
        self._emit(
            request, FinishEvent(sequence.index, reason, sequence.text.finish(), stopped_by, message, by_request)
        )
        if not all(each.ended for each in request.sequences):
            return
        del self.requests[request]
        if self._observer is not None:
            record = RequestRecord(
                request.submitted.request_id,
                reason,
                len(request.prompt),
                request.cached,
                request.num_generated,
                request.arrived,
                request.scheduled,
                request.first_token,
                self._clock(),
            )
            self._observer.on_finish(record)

    def _fail(self, requests: Iterable[EngineRequest], error: Exception | str) -> None:
        """End `requests` after an error of the backend."""
        if isinstance(error, Exception):
            _log.error("a step failed", exc_info=error)
            error = f"the model failed: {' '.join(str(error).split())[:300] or type(error).__name__}"
        self.end(
            (request for request in dict.fromkeys(requests) if request in self.requests), "error", error, keep=False
        )

    def _emit(self, request: EngineRequest, event: Event) -> None:
        try:
            request.listener(event)
        except Exception:
            # A listener may not raise. Without one, the next step frees the slots.
            _log.exception("a listener failed")
            request.listener = _ignore
            self._disconnected.append(request)

    def _end_step(self, began: float, prefilled_at: float, num_prefilled: int, rows: int) -> None:
        ended = self._clock()
        self.scheduler.on_step_end(rows, prefilled_at - began, ended - prefilled_at)
        inter_token, self._inter_token = self._inter_token, []
        if num_prefilled or rows:
            self._steps += 1
            rate = (num_prefilled + rows) / max(ended - began, 1e-6)
            self.tokens_per_second += (rate - self.tokens_per_second) * (0.1 if self._steps > 1 else 1.0)
            if self._observer is not None:
                self._observer.on_step(StepRecord(rows, num_prefilled, ended - began, tuple(inter_token)))
        self.update_stats()


def _ignore(event: Event) -> None:
    """The listener of a request whose own one failed."""
