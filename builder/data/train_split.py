"""Divide a corpus into a training and a validation side whose share is near what the recipe asks for.

Which side a document falls on depends on its text and the seed only. Where that misses the share, as it does with a few
documents or a large one, long documents give their last part and the others are taken in the order of their hashes.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from builder.data.documents import Document
from builder.data.text_boundaries import nearest_boundary
from serving.errors import InputError

# A side is near the share that was asked for if it is within this factor of it.
_NEAR = 2.0
# A document longer than this part of the validation side gives its end; a shorter one goes to one side as a whole.
_LONG = 4
# The fewest characters that are cut off.
_LEAST = 20

Reread = Callable[[], Iterable[Document]]


@dataclass(frozen=True)
class Sizes:
    """The documents of a corpus in the order they are read: characters, int64 [n]; hashes in [0, 1), float64 [n]; and
    which of them may be cut, bool [n]."""

    characters: NDArray[np.int64]
    hashes: NDArray[np.float64]
    divisible: NDArray[np.bool_]

    @classmethod
    def of(cls, documents: Iterable[Document], hash_of: Callable[[str], float]) -> Sizes:
        """Measure documents; memory holds 17 bytes each."""
        characters, hashes, divisible = array("q"), array("d"), bytearray()
        for document in documents:
            characters.append(len(document.text))
            hashes.append(hash_of(document.content))
            divisible.append(not document.segments)
        return cls(np.array(characters, np.int64), np.array(hashes), np.frombuffer(divisible, np.bool_))


def is_near(held_out: int, total: int, fraction: float) -> bool:
    """Return whether this many characters of all are near the share to hold out, and no more than the half.

    One character is not: nothing would be left to train on.
    """
    return held_out < total and fraction * total / _NEAR <= held_out <= min(_NEAR * fraction * total, (total + 1) / 2)


def split_by_size(sizes: Sizes, reread: Reread, fraction: float) -> Iterator[tuple[Document, bool]]:
    """Yield (document, whether it is held out) for all documents, a long one as its beginning and its end.

    `reread` gives the documents of `sizes` once more. Documents are long that have more than a quarter of the
    characters to hold out; each gives `fraction` of its own, if it can be cut. Of the others, those with the lowest
    hashes are held out that fit.
    """
    total = int(sizes.characters.sum())
    target = fraction * total
    cut_off = np.where(sizes.divisible & (sizes.characters > target / _LONG), fraction * sizes.characters, 0.0)
    cut_off[cut_off < _LEAST] = 0
    whole = _choose(sizes, cut_off == 0, target - cut_off.sum())
    lacking = target - cut_off.sum() - sizes.characters[whole].sum()
    if lacking > target / 2 and sizes.divisible.any():
        # Short documents that are too few to choose from: the longest one gives all that is lacking.
        longest = int(np.argmax(np.where(sizes.divisible & ~whole, sizes.characters, 0)))
        cut_off[longest] += max(lacking, _LEAST)
    for document, held_out, characters in zip(reread(), whole.tolist(), cut_off.tolist(), strict=True):
        yield from _divide(document, characters) if characters else [(document, held_out)]


def refusal(sides: tuple[int, int], documents: int, fraction: float, sequence_length: int) -> InputError:
    """The error for a corpus that cannot be divided near `fraction`; `sides` are the characters of the best try."""
    total = sum(sides)
    if not sides[1] or total < _LEAST / fraction:
        return InputError(
            f"corpus: {total:,} characters in {documents:,} document{'s' * (documents != 1)} are too few to hold out "
            f"corpus.validation_fraction {fraction:g} of them; add text in corpus.paths, some "
            f"{8 * sequence_length} characters to fill a row of {sequence_length} tokens"
        )
    share = sides[1] / total
    advice = f"or set corpus.validation_fraction={share:.2g}" if 0.001 <= share <= 0.5 else "or cut the long ones"
    return InputError(
        f"corpus: its {documents:,} documents can be split at {share:.2g} but not near corpus.validation_fraction "
        f"{fraction:g}, as one may not be cut and holds more; add documents {advice}"
    )


def _choose(sizes: Sizes, candidates: NDArray[np.bool_], room: float) -> NDArray[np.bool_]:
    """Which of the candidates are held out: in the order of their hashes, each that still fits into `room`.

    Where none fits, it is the shortest one, if that is the better miss.
    """
    chosen = np.zeros(len(sizes.characters), np.bool_)
    order = np.argsort(sizes.hashes, kind="stable")
    left = room
    for place in order[candidates[order]].tolist():
        if sizes.characters[place] <= left:
            chosen[place] = True
            left -= sizes.characters[place]
    uncut = candidates & ~sizes.divisible
    if not chosen.any() and uncut.any() and len(chosen) > 1 and room > 0:
        shortest = int(np.argmin(np.where(uncut, sizes.characters, np.iinfo(np.int64).max)))
        chosen[shortest] = True
    return chosen


def _divide(document: Document, characters: float) -> Iterator[tuple[Document, bool]]:
    """Cut about `characters` characters off the end of a document."""
    text = document.text
    length = len(text)
    low, high = length - round(1.5 * characters), length - max(1, round(0.6 * characters))
    cut = nearest_boundary(text, length - round(characters), max(low, length // 2), high)
    if not cut:
        yield document, False
        return
    yield Document(document.name, text[:cut], document.label), False
    yield Document(f"{document.name} (end)", text[cut:], document.label), True
