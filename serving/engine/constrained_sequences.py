"""The sequences whose tokens a grammar restricts: masks beside the model's step, and nobody waits for a slow one."""

from __future__ import annotations

from collections.abc import Iterable

from serving.backends.base import FloatArray
from serving.engine.mask_worker import MaskWorker
from serving.engine.requests import EngineSequence
from serving.engine.sampler import Sampled, sample
from serving.engine.scheduler import Scheduler
from serving.sampling.constraints import TokenConstraint

_PATIENCE = 0.002
"""Seconds that a step waits for masks that are not ready when the model is."""
_NAP = 0.01
"""Seconds that an engine waits for a mask where it has nothing else to do."""


class ConstrainedSequences:
    """Those of one engine.

    A sequence whose mask is not ready in time is late: it keeps its slot and its logits, and does not decode until
    the mask is there. The others of its batch decode on without it.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._masks = MaskWorker()
        self._late: dict[EngineSequence, FloatArray] = {}

    def start(self, sequences: Iterable[EngineSequence | None]) -> None:
        """Begin to compute the masks that `sequences`, about to decode, will need."""
        self._masks.start(_constraints(sequences))

    def hold_late(self, sequences: list[EngineSequence | None], logits: FloatArray) -> None:
        """Take those whose masks are not ready out of `sequences`, and keep their rows of `logits` [rows, vocab]."""
        self._masks.wait(_constraints(sequences), _PATIENCE)
        for row, sequence in enumerate(sequences):
            if sequence is None or sequence.constraint is None or sequence.constraint.ready:
                continue
            self._late[sequence] = logits[row].copy()
            self._scheduler.pause(sequence)
            sequences[row] = None

    def sample_late(self) -> list[Sampled]:
        """The next tokens of those that were late and are not any more; they decode again from this step on.

        Where the engine has nothing else to do, it waits for one of them for a moment.
        """
        if not self._late:
            return []
        if not self._scheduler.running and not self._scheduler.prefilling:
            self._masks.wait(_constraints(self._late), _NAP, every=False)
        ready = [sequence for sequence in self._late if sequence.constraint is not None and sequence.constraint.ready]
        sampled = []
        for sequence in ready:
            self._scheduler.resume(sequence)
            sampled += sample(self._late.pop(sequence)[None], [sequence])
        return sampled

    def forget(self, sequence: EngineSequence) -> None:
        """Take note that `sequence` has ended."""
        self._late.pop(sequence, None)

    def close(self) -> None:
        """End the threads that compute masks."""
        self._masks.close()


def _constraints(sequences: Iterable[EngineSequence | None]) -> list[TokenConstraint]:
    return [sequence.constraint for sequence in sequences if sequence is not None and sequence.constraint is not None]
