"""The slots of the KV cache: which prefixes they hold, and how sequences stay dense in the leading rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from serving.engine.requests import EngineSequence, Slot


@dataclass(frozen=True)
class Copy:
    """The first `length` positions of `source` become those of `target`, which then holds `tokens` under `salt`."""

    source: Slot
    target: Slot
    length: int
    tokens: tuple[int, ...]
    salt: str


class SlotTable:
    """All slots of one backend.

    A free slot keeps the prefix of its last prompt, in whole chunks, until a sequence needs the slot. Sequences get low
    slots, so that the leading rows, which a decode step computes, have few idle ones. `copies` says whether positions
    can be copied from slot to slot. If not, a prefix is reused only in its own slot, and no sequence changes its slot.
    """

    def __init__(self, slots: int, chunk: int, copies: bool) -> None:
        self.slots = [Slot(index) for index in range(slots)]
        self._chunk, self._copies = chunk, copies
        self._clock = 0

    @property
    def free(self) -> list[Slot]:
        """Free slots, the lowest first."""
        return [slot for slot in self.slots if slot.sequence is None]

    def place(self, sequence: EngineSequence, prompt: Sequence[int], reuse: bool) -> tuple[int, list[Copy]]:
        """Give `sequence` a free slot; return how many cached tokens of `prompt` it holds after the returned copies.

        There must be a free slot. The last token of a prompt is always prefilled, since its logits are needed.
        """
        occupied = len(self.slots) - len(self.free)
        near = [slot for slot in self.free if slot.index <= occupied]
        length, source = self._longest(prompt, sequence.request.submitted.cache_salt) if reuse else (0, None)
        if source is not None and source.sequence is None and (source in near or not self._copies):
            copies = self._save(source) if len(source.tokens) > length else []
            self._occupy(source, sequence, length)
            return length, copies
        # The oldest of those that leave no new hole; an empty one first.
        target = min(near, key=lambda slot: (self._wanted(slot), slot.used, slot.index))
        copies = self._save(target, source)
        if source is not None:
            copies.append(Copy(source, target, length, source.tokens[:length], source.salt))
        self._occupy(target, sequence, 0)
        return length, copies

    def reserve(self, sequence: EngineSequence) -> None:
        """Give `sequence` the lowest free slot and discard its contents."""
        self._occupy(self.free[0], sequence, 0)

    def copied(self, copy: Copy) -> None:
        """Record that `copy` was made."""
        copy.target.tokens, copy.target.salt = copy.tokens, copy.salt
        copy.target.filled = copy.length

    def release(self, slot: Slot, keep: bool = True) -> None:
        """Free `slot`; without `keep`, discard its contents."""
        slot.sequence = None
        if not keep:
            slot.tokens = ()
        slot.filled = len(slot.tokens)

    def compact(self, highest: EngineSequence, left: int) -> list[Copy]:
        """Copies that let `compacted` put `highest` into a lower free slot; none if that does not pay.

        `left` is the number of steps that it may still take.
        """
        top = highest.slot
        if top is None or not self._copies:
            return []
        holes = [slot for slot in self.free if slot.index < top.index]
        # An estimate: one row of a step costs as much as copying 64 positions (docs/decisions/engine.md).
        if not holes or left * 64 < top.filled:
            return []
        hole = min(holes, key=lambda slot: (self._wanted(slot), slot.used, slot.index))
        return [*self._save(hole), Copy(top, hole, top.filled, top.tokens, top.salt)]

    def compacted(self, copy: Copy) -> None:
        """Record that `copy`, the last one of `compact`, was made: its sequence continues in the target."""
        sequence, source, target = copy.source.sequence, copy.source, copy.target
        assert sequence is not None
        self.copied(copy)
        target.used = source.used
        target.sequence, sequence.slot = sequence, target
        self.release(source)

    def _occupy(self, slot: Slot, sequence: EngineSequence, length: int) -> None:
        self._clock += 1
        slot.tokens, slot.filled, slot.used = slot.tokens[:length], length, self._clock
        slot.sequence, sequence.slot = sequence, slot
        slot.salt = sequence.request.submitted.cache_salt

    def _longest(self, prompt: Sequence[int], salt: str) -> tuple[int, Slot | None]:
        """The longest cached prefix of `prompt` under `salt`, in whole chunks, and its slot."""
        usable = tuple(prompt[: (len(prompt) - 1) // self._chunk * self._chunk])
        best: tuple[int, Slot | None] = (0, None)
        for slot in self.slots if self._copies else self.free:
            if slot.salt != salt:
                continue
            length = 0
            while (block := usable[length : length + self._chunk]) and block == slot.tokens[
                length : length + self._chunk
            ]:
                length += self._chunk
            if length > best[0]:
                best = (length, slot)
        return best

    def _save(self, slot: Slot, source: Slot | None = None) -> list[Copy]:
        """Copies that save the prefix of `slot`, which is about to be overwritten, over an older one.

        `source` is a slot that a later copy reads.
        """
        others = [each for each in self.free if each is not slot and each is not source]
        if not self._copies or not others or not self._wanted(slot):
            return []
        oldest = min(others, key=lambda each: (self._wanted(each), each.used))
        if self._wanted(oldest) and oldest.used > slot.used:
            return []
        oldest.tokens, oldest.filled, oldest.used = (), 0, slot.used
        return [Copy(slot, oldest, len(slot.tokens), slot.tokens, slot.salt)]

    def _wanted(self, slot: Slot) -> bool:
        """Whether `slot` holds a prefix that no other slot holds."""
        length = len(slot.tokens)
        return length > 0 and not any(
            each is not slot and each.salt == slot.salt and each.tokens[:length] == slot.tokens for each in self.slots
        )
