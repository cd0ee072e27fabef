"""Speculative decoding of a sequence that runs alone: what to verify, and that no token differs from plain decoding.

One step verifies a draft. Its logits, and the KV cache rows that it writes, may differ in the last bits from those of
single-token steps. A token that these bits could change is not emitted: the sequence first repeats its inexact
positions in single-token steps, and then samples that token from exact logits (docs/decisions/speculation.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from serving.backends.base import FloatArray, NextTokens
from serving.engine.requests import EngineSequence, SpeculationState
from serving.engine.scheduler import Scheduler
from serving.engine.slot_backend import SlotBackend, supports_device_sampling
from serving.generation.drafts import Draft, Drafter
from serving.generation.pacing import Pacing
from serving.sampling.certainty import absolute_tolerance, is_certain, is_far_ahead

MAX_SEQUENCES = 1
"""Speculation runs while at most this many sequences decode: a verify step has one row of the KV cache."""


@dataclass
class SpeculationCounts:
    """Tokens that were drafted and accepted, by source, and positions that were repeated."""

    drafted: dict[str, int] = field(default_factory=lambda: {"prompt": 0, "ngram": 0})
    accepted: dict[str, int] = field(default_factory=lambda: {"prompt": 0, "ngram": 0})
    replayed: int = 0


class Speculation:
    """Speculation of one engine.

    Args:
        backend, scheduler: those of the engine.
        enabled: whether to draft at all.
        table: likely next tokens, if the bundle has such a table.
        clock: the engine's, in seconds.
    """

    def __init__(
        self,
        backend: SlotBackend,
        scheduler: Scheduler,
        enabled: bool,
        table: NextTokens | None,
        clock: Callable[[], float],
    ) -> None:
        self._backend, self._scheduler, self._table, self._clock = backend, scheduler, table, clock
        self._step = backend.verify_step if enabled and not supports_device_sampling(backend) else None
        self._tolerance = self._step.tolerance if self._step is not None else 0.0
        self._pacing = None if self._step is None else Pacing(self._step)
        self._alone: EngineSequence | None = None
        """The sequence whose steps are measured: it decodes alone and may draft."""
        self._last: EngineSequence | None = None
        """The sequence whose step was measured last."""
        self._began = self._drafted = self._ended = self._between = 0.0
        self.counts = SpeculationCounts()

    def draft(self) -> tuple[EngineSequence, Draft] | None:
        """The sequence that decodes alone, and the draft to verify; None for a plain step."""
        self._alone = None
        running = self._scheduler.running
        if self._step is None or not 0 < len(running) <= MAX_SEQUENCES or self._scheduler.prefilling:
            return None
        (sequence,) = running
        request, slot = sequence.request, sequence.slot
        if sequence.constraint is not None or request.scoring or slot is None:
            return None
        state = sequence.speculation
        if state is None:
            state = sequence.speculation = self._open(sequence)
        if state.target is not None or state.pace.never:
            return None
        self._alone, self._began = sequence, self._clock()
        self._drafted = self._began
        if not state.pace.drafts:
            return None
        state.drafter.extend(sequence.tokens[len(state.drafter.tokens) - len(request.prompt) :])
        room = min(request.max_new_tokens - sequence.num_generated, self._backend.max_length - slot.filled)
        draft = state.drafter.draft(room - 1)
        self._drafted = self._clock()
        return None if draft is None else (sequence, draft)

    def on_plain(self) -> None:
        """Record that the step that began with the last `draft` gave one token."""
        state = self._end()
        if state is not None:
            seconds = self._ended - self._drafted + self._between
            state.pace.on_plain(seconds, self._drafted - self._began, state.inexact is None)

    def _end(self) -> SpeculationState | None:
        """End the time of a step; the state of its sequence if that is measured."""
        sequence, self._alone = self._alone, None
        last, self._last = self._last, sequence
        if sequence is None:
            return None
        # The engine's own work between two steps is part of what a step costs. Time without a request is not.
        self._between = self._began - self._ended if last is sequence else 0.0
        self._ended = self._clock()
        return sequence.speculation

    def _open(self, sequence: EngineSequence) -> SpeculationState:
        assert self._step is not None and self._pacing is not None
        pace = self._pacing.pace(sequence.params, sequence.request.submitted.logprobs is not None)
        state = SpeculationState(Drafter(self._step.tokens, pace, self._table), pace)
        if not pace.never:
            state.drafter.extend(sequence.request.prompt)
        return state

    def on_accepted(self, sequence: EngineSequence, position: int) -> None:
        """Record that a verify step wrote `position` for good."""
        state = sequence.speculation
        if state is not None and state.inexact is None and self._tolerance:
            state.inexact = position

    def on_verified(self, draft: Draft, accepted: int, emitted: int, verified: float) -> None:
        """Record that the first `accepted` tokens of `draft` were right, and that the step gave `emitted` tokens.

        `verified` is the time at which its logits were there.
        """
        self.counts.drafted[draft.source] += len(draft.tokens)
        self.counts.accepted[draft.source] += accepted
        state = self._end()
        if state is not None:
            state.pace.on_verified(
                len(draft.tokens),
                emitted,
                self._drafted - self._began,
                verified - self._drafted + self._between,
                self._ended - verified,
            )

    def totals(self) -> dict[str, int]:
        """The counts, by the names of the fields of EngineStats."""
        counts = self.counts
        named = {f"drafted_{source}_tokens": count for source, count in counts.drafted.items()}
        named |= {f"accepted_{source}_tokens": count for source, count in counts.accepted.items()}
        return {**named, "replayed_tokens": counts.replayed}

    def certain(self, sequence: EngineSequence, line: FloatArray, token: int) -> bool:
        """Whether plain decoding surely samples `token`, which `line` [vocab], with bias and penalties, gives.

        If not, the sequence replays its inexact positions from the next step on.
        """
        if not self._tolerance:
            return True
        params = sequence.params
        if is_far_ahead(line, token, params, self._tolerance):
            return True
        tolerance = absolute_tolerance(line, params, self._tolerance)
        if is_certain(line, token, params, sequence.seed, sequence.num_generated, tolerance):
            return True
        self._replay(sequence)
        return False

    def hold_replaying(self, sequences: list[EngineSequence | None]) -> None:
        """After a plain step, before its tokens are sampled: remove the rows that are still in a replay."""
        for row, sequence in enumerate(sequences):
            state = None if sequence is None else sequence.speculation
            if sequence is None or state is None or state.target is None or sequence.slot is None:
                continue
            filled = sequence.slot.filled
            if filled <= state.target:
                sequences[row] = None
                sequence.last_token = _token(sequence, filled)
                self.counts.replayed += 1
                state.pace.on_replayed()
            else:
                state.target = state.inexact = None

    def inexact(self, sequence: EngineSequence) -> bool:
        """Whether the sequence's KV cache has rows whose last bits may differ from those of plain decoding."""
        return sequence.speculation is not None and sequence.speculation.inexact is not None

    def _replay(self, sequence: EngineSequence) -> None:
        """Go back to the first inexact position; the token after the newest one is sampled when that is exact."""
        state, slot = sequence.speculation, sequence.slot
        assert state is not None and slot is not None
        newest = len(sequence.request.prompt) + sequence.num_generated - 1
        first = newest if state.inexact is None else min(state.inexact, newest)
        state.inexact, state.target = first, newest
        slot.filled, sequence.last_token = first, _token(sequence, first)


def _token(sequence: EngineSequence, position: int) -> int:
    prompt: Sequence[int] = sequence.request.prompt
    return prompt[position] if position < len(prompt) else sequence.tokens[position - len(prompt)]
