"""Choose and clean the documents of a corpus, and count what each step did.

The steps run in this order: cleaning of each text, boilerplate lines, trimming, length, copies, near-duplicates. All
come before the split, so no document is on one side while its copy is on the other. Memory holds one document, 16 bytes
for each document kept, and what `boilerplate_lines` and `NearDuplicates` say of themselves.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from builder.cleaning import remove_lines, steps, tidy_space, trim
from builder.documents import Document, read_file, write_document
from builder.duplicates import NearDuplicates
from builder.recipe import CleaningRecipe, Recipe

_COUNTED_LINES = 1 << 19
_SAMPLES = 5
_SAMPLE_CHARACTERS = 400


@dataclass
class Tally:
    """What was read, changed and dropped.

    `cleaning` has, for each step, how many documents it changed and how many characters it took away (negative where it
    made text longer). `lengths` counts the kept documents by the power of two that their characters reach.
    """

    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    cleaning: dict[str, dict[str, int]] = field(default_factory=dict)
    lengths: Counter[int] = field(default_factory=Counter)
    samples: list[dict[str, str]] = field(default_factory=list)

    def changed(self, step: str, before: str, after: str) -> None:
        """Count one text that a step was run on."""
        counts = self.cleaning.setdefault(step, {"documents": 0, "characters_removed": 0})
        if before != after:
            counts["documents"] += 1
            counts["characters_removed"] += len(before) - len(after)

    def sample(self, name: str, before: str, after: str) -> None:
        """Keep the first few changed texts, from just before where they were changed."""
        if len(self.samples) < _SAMPLES and before != after:
            same = next((i for i, (old, new) in enumerate(zip(before, after, strict=False)) if old != new), len(after))
            start = max(0, same - _SAMPLE_CHARACTERS // 4)
            piece = slice(start, start + _SAMPLE_CHARACTERS)
            self.samples.append({"name": name, "before": before[piece], "after": after[piece]})


def curate(
    documents: Iterable[Document], recipe: Recipe, scratch: Path, tally: Tally
) -> Iterator[tuple[Document, float]]:
    """Yield the documents that are kept, cleaned, each with its `share`.

    `scratch` is a file name to use where texts are read twice.
    """
    cleaned = _clean_each(documents, recipe.cleaning, tally)
    if recipe.cleaning.boilerplate_documents:
        cleaned = _without_boilerplate(cleaned, recipe.cleaning, scratch, tally)
    for document, digest in _select(cleaned, recipe, tally):
        tally.lengths[1 << (len(document.text).bit_length() - 1)] += 1
        yield document, _fraction(digest)


def share(text: str, seed: bytes) -> float:
    """Return the fraction in [0, 1) that a text, white space folded, and the seed hash to."""
    return _fraction(_digest(text, seed))


def boilerplate_lines(texts: Iterable[str], documents: int, characters: int) -> set[str]:
    """Return the lines (blanks at both ends aside) of at least `characters` that stand in at least `documents` texts.

    At most 524,288 lines are counted at a time, by hashes of 8 bytes, some 60 MB: where there are more, all counts go
    down by one and those at none are forgotten (Misra and Gries, 1982). So a line in fewer texts is never among
    them, and one in many more always is.
    """
    counts: dict[bytes, int] = {}
    common: set[str] = set()
    for text in texts:
        for line in {line.strip() for line in text.split("\n")}:
            if len(line) < characters:
                continue
            key = hashlib.blake2b(line.encode("utf-8"), digest_size=8).digest()
            counts[key] = counts.get(key, 0) + 1
            if counts[key] >= documents:
                common.add(line)
        if len(counts) > _COUNTED_LINES:
            counts = {key: count - 1 for key, count in counts.items() if count > 1}
    return common


def _clean_each(documents: Iterable[Document], recipe: CleaningRecipe, tally: Tally) -> Iterator[Document]:
    functions = list(steps(recipe))
    for document in documents:
        tally.read += 1
        cleaned = document
        for name, step in functions:
            before, cleaned = cleaned, cleaned.mapped(step)
            tally.changed(name, before.text, cleaned.text)
        tally.sample(document.name, document.text, cleaned.text)
        yield cleaned


def _without_boilerplate(
    documents: Iterable[Document], recipe: CleaningRecipe, scratch: Path, tally: Tally
) -> Iterator[Document]:
    with scratch.open("w", encoding="utf-8", newline="\n") as file:

        def texts() -> Iterator[str]:
            for document in documents:
                write_document(file, document)
                yield document.content

        lines = boilerplate_lines(texts(), recipe.boilerplate_documents, recipe.boilerplate_characters)

    def remove(text: str) -> tuple[str, bool]:
        cleaned, removed = remove_lines(text, lines)
        if removed and recipe.white_space != "keep":
            cleaned, _ = tidy_space(cleaned, words=False)
        return cleaned, removed

    for document in read_file(scratch):
        cleaned = document.mapped(remove)
        tally.changed("boilerplate", document.text, cleaned.text)
        tally.sample(document.name, document.text, cleaned.text)
        yield cleaned
    scratch.unlink()


def _select(documents: Iterable[Document], recipe: Recipe, tally: Tally) -> Iterator[tuple[Document, bytes]]:
    settings, seed = recipe.corpus, str(recipe.seed).encode()
    near = NearDuplicates(settings, recipe.seed) if settings.near_duplicates else None
    seen: set[bytes] = set()
    for document in documents:
        document = document.ended()
        if settings.trim and settings.max_characters:
            trimmed = document.trimmed(settings.max_characters, trim)
            tally.changed("trim", document.text, trimmed.text)
            document = trimmed
        text = document.content
        if not document.is_answered:
            tally.dropped["no response"] += 1
            continue
        if len(text.strip()) < settings.min_characters:
            tally.dropped["too short"] += 1
            continue
        if settings.max_characters and len(document.text) > settings.max_characters:
            tally.dropped["too long"] += 1
            continue
        digest = _digest(text, seed)
        if settings.deduplicate:
            if digest in seen:
                tally.dropped["duplicate"] += 1
                continue
            seen.add(digest)
        if near and near.is_repeat(text):
            tally.dropped["near-duplicate"] += 1
            continue
        yield document, digest


def _fraction(digest: bytes) -> float:
    return int.from_bytes(digest[:6], "big") / 2**48


def _digest(text: str, seed: bytes) -> bytes:
    return hashlib.blake2b(" ".join(text.split()).encode("utf-8"), digest_size=16, key=seed).digest()
