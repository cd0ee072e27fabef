"""Scheduling: which prompt the next step prefills, by how many tokens, and which sequences decode."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from serving.backends.base import FloatArray, IntArray
from serving.engine.prefill_budget import PrefillBudget
from serving.engine.requests import EngineRequest, EngineSequence, Slot
from serving.engine.slot_backend import SlotBackend
from serving.engine.slot_table import Copy, SlotTable


@dataclass(frozen=True)
class ScheduledPrefill:
    """Copies of cached prefixes, or one prefill chunk: `tokens` after the first `start` positions of `slot`."""

    request: EngineRequest
    copies: tuple[Copy, ...] = ()
    slot: Slot | None = None
    tokens: tuple[int, ...] = ()
    start: int = 0
    scores: bool = False
    """Whether the logits after each token are needed, not only those after the last one."""

    @property
    def ends(self) -> bool:
        """Whether this is the last chunk of its prompt."""
        return self.slot is not None and self.start + len(self.tokens) == len(self.request.prompt)

    def run(self, backend: SlotBackend) -> FloatArray | None:
        """Run it on `backend`; return the logits after the chunk, or None for copies."""
        for copy in self.copies:
            backend.copy_prefix(copy.source.index, copy.target.index, copy.length)
        if self.slot is None:
            return None
        return backend.prefill_chunk(self.slot.index, self.tokens, self.start)


class Scheduler:
    """Schedules requests first come, first served, on the slots of one backend.

    Prompts are prefilled one at a time. While sequences decode, each step runs one prefill chunk, of a size within the
    prefill budget, or one copy. Otherwise a step prefills up to `max_batched_tokens` tokens.

    Results do not depend on the load. A row of a matrix product has the same bits among any number of rows above one,
    so no chunk has a single token, except a last token that is alone in its block of `chunk`
    (docs/decisions/engine.md).
    """

    def __init__(
        self,
        backend: SlotBackend,
        chunk: int,
        max_batched_tokens: int,
        prefill_budget: PrefillBudget,
        reuse: bool = True,
    ) -> None:
        self.table = SlotTable(backend.slots, chunk, backend.copies)
        self.waiting: deque[EngineRequest] = deque()
        self.prefilling: deque[EngineRequest] = deque()
        self.running: list[EngineSequence] = []
        self.backlog = 0
        """Maximum tokens of all waiting requests together, prompts included."""
        self._chunk, self._max_batched_tokens, self._copies = chunk, max_batched_tokens, backend.copies
        self._reuse, self._scored_tokens = reuse, backend.scored_tokens
        self._last_position = backend.max_length - 1
        self._prefill_budget = prefill_budget
        self._pending: tuple[Copy, ...] = ()
        self._last_chunk: ScheduledPrefill | None = None
        """The last prefill chunk of this step."""

    def add(self, request: EngineRequest) -> None:
        """Append a request to the waiting queue."""
        self.waiting.append(request)
        self.backlog += _size(request)

    def budget(self) -> int:
        """Prompt tokens that this step may prefill while nothing decodes; a copy counts as a chunk."""
        return max(self._max_batched_tokens, self._chunk)

    def next(self, now: float, budget: int) -> ScheduledPrefill | None:
        """The next prefill, of at most `budget` tokens, or None; call `on_chunk_done` or `release` after it."""
        while not self.prefilling and self._admit(now):
            pass
        if not self.prefilling:
            return None
        request = self.prefilling[0]
        if self._pending:
            return ScheduledPrefill(request, self._pending)
        slot = request.sequences[request.holding].slot
        first = request.first.slot
        assert slot is not None and first is not None
        if request.holding and self._copies:
            return ScheduledPrefill(request, (Copy(first, slot, len(request.prompt), first.tokens, first.salt),))
        return ScheduledPrefill(
            request,
            (),
            slot,
            request.prompt[request.num_prefilled : self._end(request, budget)],
            request.num_prefilled,
            request.scoring,
        )

    def _end(self, request: EngineRequest, budget: int) -> int:
        """Position in the prompt at which the next chunk ends."""
        length = len(request.prompt)
        if self._chunk == 1:
            return request.num_prefilled + 1
        last = length - (length % self._chunk == 1)
        if request.num_prefilled >= last:
            return length
        # A request without a slot waits for a sequence to end, not for prefill.
        prompts = len(self.prefilling) + min(len(self.waiting), len(self.table.free))
        if self.running:
            budget = min(
                self._prefill_budget.tokens(request.num_prefilled, prompts),
                self._max_batched_tokens - len(self.running),
            )
        if request.scoring:
            budget = min(budget, self._scored_tokens - 1)
        end = min(last, request.num_prefilled + max(budget, 2))
        return last if last - end == 1 else end

    def left(self, prefill: ScheduledPrefill, budget: int) -> int:
        """The budget after `prefill`: 0 while sequences decode, since each call reads all weights."""
        if self.running:
            return 0
        return budget - (self._chunk if prefill.copies else len(prefill.tokens))

    def on_step_end(self, rows: int, prefill_seconds: float, decode_seconds: float) -> None:
        """Record a step that decoded `rows` rows: seconds of its prefill, and of everything else."""
        chunk, self._last_chunk = self._last_chunk, None
        if not rows:
            return
        if chunk is None:
            self._prefill_budget.on_step_end(0, 0, prefill_seconds, decode_seconds)
        else:
            self._prefill_budget.on_step_end(len(chunk.tokens), chunk.start, prefill_seconds, decode_seconds)

    def on_chunk_done(self, prefill: ScheduledPrefill) -> bool:
        """Record that `prefill` ran; return whether all sequences of the request hold the prompt and can `begin`."""
        request = prefill.request
        for copy in prefill.copies:
            self.table.copied(copy)
        if self._pending:
            self._pending = ()
            return False
        if prefill.slot is not None:
            self._last_chunk = prefill
            request.num_prefilled += len(prefill.tokens)
            prefill.slot.filled = request.num_prefilled
            prefill.slot.tokens = request.prompt[: request.num_prefilled // self._chunk * self._chunk]
            if request.num_prefilled < len(request.prompt):
                return False
        request.holding += 1
        if request.holding < len(request.sequences):
            request.num_prefilled = 0
            return False
        self.prefilling.popleft()
        return True

    def begin(self, request: EngineRequest) -> None:
        """Let the sequences of the request decode from the next step on."""
        self.running += request.sequences

    def pause(self, sequence: EngineSequence) -> None:
        """Keep the slot of `sequence`, and leave it out of the decode batch until `resume`."""
        self.running.remove(sequence)

    def resume(self, sequence: EngineSequence) -> None:
        """Let `sequence` decode again from the next step on."""
        self.running.append(sequence)

    def on_scored(self, request: EngineRequest) -> None:
        """Prefill the prompt again in chunks, now that its log-probabilities are known."""
        slot = request.first.slot
        assert slot is not None
        self.running.remove(request.first)
        slot.filled = 0
        self.prefilling.appendleft(request)

    def release(self, sequence: EngineSequence, keep: bool = True) -> None:
        """Remove the sequence and free its slot; without `keep`, the slot's contents are not reused."""
        request = sequence.request
        if sequence.slot is not None:
            self.table.release(sequence.slot, keep)
            sequence.slot = None
        if sequence in self.running:
            self.running.remove(sequence)
        elif request in self.prefilling:
            if self.prefilling[0] is request:
                self._pending = ()
            self.prefilling.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
            self.backlog -= _size(request)

    def rows(self) -> tuple[list[EngineSequence | None], IntArray, IntArray]:
        """The decode batch: the sequence of each leading row, the token to append, and the positions filled so far.

        Idle rows get a dummy token after the slot's cached tokens, or at the last position when the slot is full.
        Neither position is read before it is overwritten: the last token of a prompt is always prefilled.
        """
        sequences: list[EngineSequence | None] = []
        for sequence in self.running:
            slot = sequence.slot
            assert slot is not None
            sequences += [None] * (slot.index + 1 - len(sequences))
            sequences[slot.index] = sequence
        tokens = np.array([0 if sequence is None else sequence.last_token for sequence in sequences], np.int64)
        lengths = np.array([slot.filled for slot in self.table.slots[: len(sequences)]], np.int64)
        return sequences, tokens, np.minimum(lengths, self._last_position)

    def on_decode_done(self) -> None:
        """Record that every decoding sequence has one more position filled."""
        for sequence in self.running:
            assert sequence.slot is not None
            sequence.slot.filled += 1

    def compact(self) -> tuple[Copy, ...]:
        """Copies that let `compacted` shrink the decode batch; none while prompts wait for prefill."""
        if self.prefilling or not self.running:
            return ()
        top = max(self.running, key=lambda each: each.slot.index if each.slot else -1)
        return tuple(self.table.compact(top, top.request.max_new_tokens - top.num_generated))

    def compacted(self, copies: tuple[Copy, ...]) -> None:
        """Record that the copies of `compact` were made."""
        *saved, move = copies
        for copy in saved:
            self.table.copied(copy)
        self.table.compacted(move)

    def not_compacted(self, copies: tuple[Copy, ...]) -> None:
        """Record that not all copies of `compact` were made."""
        for copy in copies:
            copy.target.tokens, copy.target.filled = (), 0

    def _admit(self, now: float) -> bool:
        """Give the first waiting request its slots, if enough are free."""
        if not self.waiting or len(self.table.free) < self.waiting[0].submitted.n:
            return False
        request = self.waiting.popleft()
        self.backlog -= _size(request)
        request.scheduled = now
        scoring = request.scores is not None
        request.num_prefilled, copies = self.table.place(
            request.first, request.prompt, reuse=self._reuse and not scoring
        )
        request.cached = request.num_prefilled
        for sequence in request.sequences[1:]:
            self.table.reserve(sequence)
        if request.scoring and not self._scored_tokens:
            # One token a step, in the decode batch: this backend's chunks give the logits of their last token only.
            request.first.last_token = request.prompt[0]
            self.running.append(request.first)
        else:
            self._pending = tuple(copies)
            self.prefilling.append(request)
        return True


def _size(request: EngineRequest) -> int:
    return len(request.prompt) + request.max_new_tokens * request.submitted.n
