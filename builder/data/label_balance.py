"""Balance the training side by label: how many copies of each document are trained on, some of them none."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from builder.data.documents import Document, read_file, write_document
from builder.recipe import CorpusRecipe


def balance(path: Path, recipe: CorpusRecipe, seed: int) -> dict[str, dict[str, int]]:
    """Rewrite a train.jsonl so that its labels are balanced; return documents before and after for each label.

    cap keeps at most `label_cap` documents a label, down as many as the rarest label has, and up repeats documents
    until each label has as many as the commonest: each of its documents equally often, but for the rest of the
    division. Which documents that concerns is drawn by `seed`. Memory holds 20 bytes a document.
    """
    names: dict[str, int] = {}
    codes = array("I", (names.setdefault(document.label, len(names)) for document in read_file(path)))
    labels = np.frombuffer(codes, dtype=np.uint32)
    counts = np.bincount(labels, minlength=len(names))
    targets = {
        "none": counts,
        "cap": np.minimum(counts, recipe.label_cap),
        "down": np.full_like(counts, counts.min()),
        "up": np.full_like(counts, counts.max()),
    }[recipe.balance]
    if (targets != counts).any():
        _rewrite(path, _copies(labels, counts, targets, seed))
    return {name: {"before": int(counts[code]), "after": int(targets[code])} for name, code in sorted(names.items())}


def _copies(
    labels: NDArray[np.uint32], counts: NDArray[np.int64], targets: NDArray[np.int64], seed: int
) -> NDArray[np.int64]:
    """How often each document is to be written, [documents]; each label's sum is its target."""
    random = np.random.default_rng(seed)
    copies = (targets // counts)[labels]
    for label in range(len(counts)):
        more = random.permutation(np.flatnonzero(labels == label))[: targets[label] % counts[label]]
        copies[more] += 1
    return copies


def _rewrite(path: Path, copies: NDArray[np.int64]) -> None:
    """Write each document as often as `copies` says, in rounds, so that no document is next to its own copy.

    What is left for the next round goes to a file of its own, so all that is read and written is as long as the result.
    """
    result = path.with_suffix(".part")
    source, round_ = path, 1
    with result.open("w", encoding="utf-8", newline="\n") as file:
        while len(copies):
            target = path.with_suffix(f".left{round_ % 2}")
            with target.open("w", encoding="utf-8", newline="\n") as rest:
                for document, count in _with_counts(source, copies):
                    if count:
                        write_document(file, document)
                    if count > 1:
                        write_document(rest, document)
            if source != path:
                source.unlink()
            copies, source, round_ = copies[copies > 1] - 1, target, round_ + 1
    source.unlink()
    result.replace(path)


def _with_counts(path: Path, copies: NDArray[np.int64]) -> Iterator[tuple[Document, int]]:
    return ((document, int(count)) for document, count in zip(read_file(path), copies, strict=True))
