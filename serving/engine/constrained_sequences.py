"""The sequences whose tokens a grammar restricts: masks beside the model's step, and nobody waits for a slow one."""

from __future__ import annotations

from collections.abc import Iterable

from serving.backends.base import FloatArray
from serving.engine.mask_worker import MaskWorker
from serving.engine.requests import Continuation
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
        self._late: dict[Continuation, FloatArray] = {}

    def start(self, owners: Iterable[Continuation | None]) -> None:
        """Begin to compute the masks that `owners`, about to decode, will need."""
        self._masks.start(_constraints(owners))

    def hold_late(self, owners: list[Continuation | None], logits: FloatArray) -> None:
        """Take those whose masks are not ready out of `owners`, and keep their rows of `logits` [rows, vocab]."""
        self._masks.wait(_constraints(owners), _PATIENCE)
        for row, owner in enumerate(owners):
            if owner is None or owner.constraint is None or owner.constraint.ready:
                continue
            self._late[owner] = logits[row].copy()
            self._scheduler.pause(owner)
            owners[row] = None

    def sample_late(self) -> list[Sampled]:
        """The next tokens of those that were late and are not any more; they decode again from this step on.

        Where the engine has nothing else to do, it waits for one of them for a moment.
        """
        if not self._late:
            return []
        if not self._scheduler.running and not self._scheduler.reading:
            self._masks.wait(_constraints(self._late), _NAP, every=False)
        ready = [owner for owner in self._late if owner.constraint is not None and owner.constraint.ready]
        sampled = []
        for owner in ready:
            self._scheduler.resume(owner)
            sampled += sample(self._late.pop(owner)[None], [owner])
        return sampled

    def forget(self, owner: Continuation) -> None:
        """Take note that `owner` has ended."""
        self._late.pop(owner, None)

    def close(self) -> None:
        """End the threads that compute masks."""
        self._masks.close()


def _constraints(owners: Iterable[Continuation | None]) -> list[TokenConstraint]:
    return [owner.constraint for owner in owners if owner is not None and owner.constraint is not None]
