"""What the next step does: whose prompt is read on, by how much, and which rows decode."""

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
    """Copies, or one chunk of a prompt: `tokens` behind the first `start` positions of `slot`."""

    task: Task
    copies: tuple[Copy, ...] = ()
    slot: Slot | None = None
    tokens: tuple[int, ...] = ()
    start: int = 0
    scores: bool = False
    """Whether the logits after each of the tokens are wanted."""

    @property
    def ends(self) -> bool:
        """Whether it is the end of its prompt."""
        return self.slot is not None and self.start + len(self.tokens) == len(self.task.prompt)

    def run(self, backend: SlotBackend) -> FloatArray | None:
        """Do it; the logits after the chunk, if it is one."""
        for copy in self.copies:
            backend.copy_prefix(copy.source.index, copy.target.index, copy.length)
        if self.slot is None:
            return None
        return backend.prefill_chunk(self.slot.index, self.tokens, self.start)


class Scheduler:
    """Requests in the order of their arrival, on the slots of one backend.

    Prompts are read one at a time. While continuations decode, each step reads one piece, as long as `pace` says, or
    makes one copy, beside them; otherwise as many chunks as `max_batched_tokens` hold, in one piece. Numbers do not
    depend on the load: a product's row is the same among any number of rows but one, so wherever prompts are cut, no
    piece is a single token but the last one, and that if it is alone in its chunk of `chunk` (docs/decisions.md).
    """

    def __init__(
        self, backend: SlotBackend, chunk: int, max_batched_tokens: int, pace: Pace, reuse: bool = True
    ) -> None:
        self.table = SlotTable(backend.slots, chunk, backend.copies)
        self.waiting: deque[Task] = deque()
        self.reading: deque[Task] = deque()
        self.running: list[Continuation] = []
        self.backlog = 0
        """Tokens that waiting requests will take at most, prompts included."""
        self._chunk, self._max_batched_tokens, self._copies = chunk, max_batched_tokens, backend.copies
        self._reuse, self._scored_tokens = reuse, backend.scored_tokens
        self._last_position = backend.max_length - 1
        self._pace = pace
        self._pending: tuple[Copy, ...] = ()
        self._piece: Work | None = None
        """What was last read of a prompt in this step."""

    def add(self, task: Task) -> None:
        """Queue `task`."""
        self.waiting.append(task)
        self.backlog += _size(task)

    def budget(self) -> int:
        """How many prompt tokens this step may read where nothing decodes; a copy counts as a chunk."""
        return max(self._max_batched_tokens, self._chunk)

    def next(self, now: float, budget: int) -> Work | None:
        """The next piece of work on prompts, of at most `budget` tokens; `done` or `release` must follow before it is
        asked again."""
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
        """How far the next piece of a prompt goes."""
        length = len(task.prompt)
        if self._chunk == 1:
            return task.read + 1
        last = length - (length % self._chunk == 1)
        if task.read >= last:
            return length
        # Who waits for a slot waits for a text to end, and not for prompts to be read.
        prompts = len(self.reading) + min(len(self.waiting), len(self.table.free))
        if self.running:
            budget = min(self._pace.tokens(task.read, prompts), self._max_batched_tokens - len(self.running))
        if task.scoring:
            budget = min(budget, self._scored_tokens - 1)
        end = min(last, task.read + max(budget, 2))
        return last if last - end == 1 else end

    def left(self, work: Work, budget: int) -> int:
        """What `work` leaves of a step's budget: nothing beside continuations, since each call reads all weights."""
        if self.running:
            return 0
        return budget - (self._chunk if work.copies else len(work.tokens))

    def stepped(self, rows: int, reading: float, other: float) -> None:
        """Take note of the end of a step in which `rows` decoded: seconds for the work on prompts, and for all else."""
        piece, self._piece = self._piece, None
        if not rows:
            return
        if piece is None:
            self._pace.stepped(0, 0, reading, other)
        else:
            self._pace.stepped(len(piece.tokens), piece.start, reading, other)

    def done(self, work: Work) -> bool:
        """Take note that `work` was done; True if with it all continuations hold the prompt, and may `begin`."""
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
        """Let the continuations of `task` decode from the next step on."""
        self.running += task.continuations

    def pause(self, continuation: Continuation) -> None:
        """Let `continuation` keep its slot and not decode, until `resume`."""
        self.running.remove(continuation)

    def resume(self, continuation: Continuation) -> None:
        """Let `continuation` decode again from the next step on."""
        self.running.append(continuation)

    def scored(self, task: Task) -> None:
        """All log-probabilities of the prompt are there: read it now as every other prompt is read."""
        slot = task.first.slot
        assert slot is not None
        self.running.remove(task.first)
        slot.filled = 0
        self.reading.appendleft(task)

    def release(self, continuation: Continuation, keep: bool = True) -> None:
        """Forget `continuation`, wherever it is, and free its slot; without `keep`, its contents are not reused."""
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
        """Who decodes in each of the leading rows, the tokens to append, and the positions held by now.

        A row of nobody's gets a token behind what its slot holds, where it disturbs nothing; or in the last position of
        a slot that one prompt fills, which no other prompt takes over, as its own last token is always read.
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
        """Take note that all who decode have a position more."""
        for continuation in self.running:
            assert continuation.slot is not None
            continuation.slot.filled += 1

    def narrow(self) -> tuple[Copy, ...]:
        """Copies after which `moved` makes the step narrower; none while there are prompts to read."""
        if self.reading or not self.running:
            return ()
        top = max(self.running, key=lambda each: each.slot.index if each.slot else -1)
        return tuple(self.table.narrow(top, top.task.budget - top.made))

    def moved(self, copies: tuple[Copy, ...]) -> None:
        """Take note that the copies of `narrow` were made."""
        *saved, move = copies
        for copy in saved:
            self.table.copied(copy)
        self.table.moved(move)

    def not_moved(self, copies: tuple[Copy, ...]) -> None:
        """Take note that not all copies of `narrow` were made."""
        for copy in copies:
            copy.target.tokens, copy.target.filled = (), 0

    def _admit(self, now: float) -> bool:
        """Give the first request in the queue its slots, if there are enough."""
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
            # Token by token beside the others: this backend's chunk gives the logits of its last token only.
            task.first.last = task.prompt[0]
            self.running.append(task.first)
        else:
            self._pending = tuple(copies)
            self.reading.append(task)
        return True


def _size(task: Task) -> int:
    return len(task.prompt) + task.budget * task.request.n
