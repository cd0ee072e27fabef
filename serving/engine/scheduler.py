"""Scheduling: which prompt the next step prefills, by how many tokens, and which sequences decode."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from serving.backends.base import FloatArray, IntArray
from serving.engine.prefill_budget import Pace
from serving.engine.requests import Continuation, Slot, Task
from serving.engine.slot_backend import SlotBackend
from serving.engine.slot_table import Copy, SlotTable


@dataclass(frozen=True)
class Work:
    """Copies of cached prefixes, or one prefill chunk: `tokens` after the first `start` positions of `slot`."""

    task: Task
    copies: tuple[Copy, ...] = ()
    slot: Slot | None = None
    tokens: tuple[int, ...] = ()
    start: int = 0
    scores: bool = False
    """Whether the logits after each token are needed, not only those after the last one."""

    @property
    def ends(self) -> bool:
        """Whether this is the last chunk of its prompt."""
        return self.slot is not None and self.start + len(self.tokens) == len(self.task.prompt)

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
        self, backend: SlotBackend, chunk: int, max_batched_tokens: int, pace: Pace, reuse: bool = True
    ) -> None:
        self.table = SlotTable(backend.slots, chunk, backend.copies)
        self.waiting: deque[Task] = deque()
        self.reading: deque[Task] = deque()
        self.running: list[Continuation] = []
        self.backlog = 0
        """Maximum tokens of all waiting requests together, prompts included."""
        self._chunk, self._max_batched_tokens, self._copies = chunk, max_batched_tokens, backend.copies
        self._reuse, self._scored_tokens = reuse, backend.scored_tokens
        self._last_position = backend.max_length - 1
        self._pace = pace
        self._pending: tuple[Copy, ...] = ()
        self._piece: Work | None = None
        """The last prefill chunk of this step."""

    def add(self, task: Task) -> None:
        """Append a request to the waiting queue."""
        self.waiting.append(task)
        self.backlog += _size(task)

    def budget(self) -> int:
        """Prompt tokens that this step may prefill while nothing decodes; a copy counts as a chunk."""
        return max(self._max_batched_tokens, self._chunk)

    def next(self, now: float, budget: int) -> Work | None:
        """The next prefill, of at most `budget` tokens, or None; call `done` or `release` after it."""
        while not self.reading and self._admit(now):
            pass
        if not self.reading:
            return None
        task = self.reading[0]
        if self._pending:
            return Work(task, self._pending)
        slot = task.continuations[task.holding].slot
        first = task.first.slot
        assert slot is not None and first is not None
        if task.holding and self._copies:
            return Work(task, (Copy(first, slot, len(task.prompt), first.tokens, first.salt),))
        return Work(task, (), slot, task.prompt[task.read : self._end(task, budget)], task.read, task.scoring)

    def _end(self, task: Task, budget: int) -> int:
        """Position in the prompt at which the next chunk ends."""
        length = len(task.prompt)
        if self._chunk == 1:
            return task.read + 1
        last = length - (length % self._chunk == 1)
        if task.read >= last:
            return length
        # A request without a slot waits for a sequence to end, not for prefill.
        prompts = len(self.reading) + min(len(self.waiting), len(self.table.free))
        if self.running:
            budget = min(self._pace.tokens(task.read, prompts), self._max_batched_tokens - len(self.running))
        if task.scoring:
            budget = min(budget, self._scored_tokens - 1)
        end = min(last, task.read + max(budget, 2))
        return last if last - end == 1 else end

    def left(self, work: Work, budget: int) -> int:
        """The budget after `work`: 0 while sequences decode, since each call reads all weights."""
        if self.running:
            return 0
        return budget - (self._chunk if work.copies else len(work.tokens))

    def stepped(self, rows: int, reading: float, other: float) -> None:
        """Record a step that decoded `rows` rows: seconds of its prefill, and of everything else."""
        piece, self._piece = self._piece, None
        if not rows:
            return
        if piece is None:
            self._pace.stepped(0, 0, reading, other)
        else:
            self._pace.stepped(len(piece.tokens), piece.start, reading, other)

    def done(self, work: Work) -> bool:
        """Record that `work` ran; return whether all sequences of the request hold the prompt and can `begin`."""
        task = work.task
        for copy in work.copies:
            self.table.copied(copy)
        if self._pending:
            self._pending = ()
            return False
        if work.slot is not None:
            self._piece = work
            task.read += len(work.tokens)
            work.slot.filled = task.read
            work.slot.tokens = task.prompt[: task.read // self._chunk * self._chunk]
            if task.read < len(task.prompt):
                return False
        task.holding += 1
        if task.holding < len(task.continuations):
            task.read = 0
            return False
        self.reading.popleft()
        return True

    def begin(self, task: Task) -> None:
        """Let the sequences of the request decode from the next step on."""
        self.running += task.continuations

    def pause(self, continuation: Continuation) -> None:
        """Keep the slot of `continuation`, and leave it out of the decode batch until `resume`."""
        self.running.remove(continuation)

    def resume(self, continuation: Continuation) -> None:
        """Let `continuation` decode again from the next step on."""
        self.running.append(continuation)

    def scored(self, task: Task) -> None:
        """Prefill the prompt again in chunks, now that its log-probabilities are known."""
        slot = task.first.slot
        assert slot is not None
        self.running.remove(task.first)
        slot.filled = 0
        self.reading.appendleft(task)

    def release(self, continuation: Continuation, keep: bool = True) -> None:
        """Remove the sequence and free its slot; without `keep`, the slot's contents are not reused."""
        task = continuation.task
        if continuation.slot is not None:
            self.table.release(continuation.slot, keep)
            continuation.slot = None
        if continuation in self.running:
            self.running.remove(continuation)
        elif task in self.reading:
            if self.reading[0] is task:
                self._pending = ()
            self.reading.remove(task)
        elif task in self.waiting:
            self.waiting.remove(task)
            self.backlog -= _size(task)

    def rows(self) -> tuple[list[Continuation | None], IntArray, IntArray]:
        """The decode batch: the sequence of each leading row, the token to append, and the positions filled so far.

        Idle rows get a dummy token after the slot's cached tokens, or at the last position when the slot is full.
        Neither position is read before it is overwritten: the last token of a prompt is always prefilled.
        """
        owners: list[Continuation | None] = []
        for continuation in self.running:
            slot = continuation.slot
            assert slot is not None
            owners += [None] * (slot.index + 1 - len(owners))
            owners[slot.index] = continuation
        tokens = np.array([0 if owner is None else owner.last for owner in owners], np.int64)
        lengths = np.array([slot.filled for slot in self.table.slots[: len(owners)]], np.int64)
        return owners, tokens, np.minimum(lengths, self._last_position)

    def decoded(self) -> None:
        """Record that every decoding sequence has one more position filled."""
        for continuation in self.running:
            assert continuation.slot is not None
            continuation.slot.filled += 1

    def narrow(self) -> tuple[Copy, ...]:
        """Copies that let `moved` shrink the decode batch; none while prompts wait for prefill."""
        if self.reading or not self.running:
            return ()
        top = max(self.running, key=lambda each: each.slot.index if each.slot else -1)
        return tuple(self.table.narrow(top, top.task.budget - top.made))

    def moved(self, copies: tuple[Copy, ...]) -> None:
        """Record that the copies of `narrow` were made."""
        *saved, move = copies
        for copy in saved:
            self.table.copied(copy)
        self.table.moved(move)

    def not_moved(self, copies: tuple[Copy, ...]) -> None:
        """Record that not all copies of `narrow` were made."""
        for copy in copies:
            copy.target.tokens, copy.target.filled = (), 0

    def _admit(self, now: float) -> bool:
        """Give the first waiting request its slots, if enough are free."""
        if not self.waiting or len(self.table.free) < self.waiting[0].request.n:
            return False
        task = self.waiting.popleft()
        self.backlog -= _size(task)
        task.scheduled = now
        scoring = task.scores is not None
        task.read, copies = self.table.place(task.first, task.prompt, reuse=self._reuse and not scoring)
        task.cached = task.read
        for continuation in task.continuations[1:]:
            self.table.reserve(continuation)
        if task.scoring and not self._scored_tokens:
            # One token a step, in the decode batch: this backend's chunks give the logits of their last token only.
            task.first.last = task.prompt[0]
            self.running.append(task.first)
        else:
            self._pending = tuple(copies)
            self.reading.append(task)
        return True


def _size(task: Task) -> int:
    return len(task.prompt) + task.budget * task.request.n
