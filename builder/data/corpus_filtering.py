"""Choose and clean the documents of a corpus, and count what each step did.

The steps run in this order: the user's transform, cleaning of each text, boilerplate lines, trimming, length, copies,
near-duplicates. All come before the split, so no document is on one side while its copy is on the other. What needs one
text only runs in several processes; what comes out is the same for any number of them. Memory holds the chunks under
way (about a million characters each), a block of 16 million characters, and what `boilerplate_lines` and `DiskIndex`
say of themselves.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from builder.data.cleaning import remove_lines, steps, tidy_space, trim
from builder.data.deduplication import Copies, NearDuplicates, Signatures, require_rensa, sign
from builder.data.documents import Document, read_file, write_document
from builder.data.process_map import map_in_order
from builder.data.transforms import load_transform
from builder.recipe import Recipe

_COUNTED_LINES = 1 << 19
_SAMPLES = 5
_SAMPLE_CHARACTERS = 400
# A chunk is what a worker gets at a time; a block of several is what is looked up in the indices at a time.
_CHUNK_CHARACTERS, _CHUNK_DOCUMENTS = 1 << 20, 1 << 11
_BLOCK_CHARACTERS, _BLOCK_DOCUMENTS = 1 << 24, 1 << 13


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
        """Keep the first few texts changed in what can be seen of them, from just before where they were changed."""
        if len(self.samples) < _SAMPLES and before.strip() != after.strip():
            same = next((i for i, (old, new) in enumerate(zip(before, after, strict=False)) if old != new), len(after))
            start = max(0, same - _SAMPLE_CHARACTERS // 4)
            piece = slice(start, start + _SAMPLE_CHARACTERS)
            self.samples.append({"name": name, "before": before[piece], "after": after[piece]})

    def add(self, other: Tally) -> None:
        """Count what `other` counted, of the documents that follow."""
        self.read += other.read
        self.dropped.update(other.dropped)
        self.lengths.update(other.lengths)
        self.samples += other.samples[: _SAMPLES - len(self.samples)]
        for step, counts in other.cleaning.items():
            ours = self.cleaning.setdefault(step, dict.fromkeys(counts, 0))
            for key, count in counts.items():
                ours[key] += count


@dataclass
class Chunk:
    """Documents on their way, what was counted of them, and once they are chosen by length, what they are compared by.

    `digests` has 16 bytes a document; `signatures` is None where near-duplicates are kept.
    """

    documents: list[Document]
    tally: Tally
    digests: list[bytes] = field(default_factory=list)
    signatures: Signatures | None = None


def filter_documents(
    documents: Iterable[Document], recipe: Recipe, scratch: Path, tally: Tally, workers: int = 1
) -> Generator[tuple[Document, float]]:
    """Yield the documents that are kept, cleaned, each with its `share`.

    `scratch` is a folder to make for what does not stay in memory; it is removed at the end.
    """
    if recipe.corpus.near_duplicates:
        require_rensa()  # Said before any text is read, as is a transform that cannot be loaded.
    if recipe.corpus.transform:
        load_transform(recipe.corpus.transform)
    try:
        if recipe.cleaning.boilerplate_documents:
            scratch.mkdir(parents=True, exist_ok=True)
            cleaned = map_in_order(partial(_clean, recipe), _chunks(documents), workers)
            unwanted = _find_boilerplate(cleaned, recipe, scratch / "cleaned.jsonl", tally)
            finish = partial(_without_boilerplate, recipe, unwanted)
            chunks = map_in_order(finish, _chunks(read_file(scratch / "cleaned.jsonl")), workers)
        else:
            chunks = map_in_order(partial(_clean_and_measure, recipe), _chunks(documents), workers)
        for document, digest in _without_repeats(chunks, recipe, scratch, tally):
            tally.lengths[1 << (len(document.text).bit_length() - 1)] += 1
            yield document, _fraction(digest)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


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


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text)
        if characters >= _CHUNK_CHARACTERS or len(chunk) >= _CHUNK_DOCUMENTS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _clean(recipe: Recipe, documents: list[Document]) -> Chunk:
    functions = list(steps(recipe.cleaning))
    if recipe.corpus.transform:
        functions.insert(0, ("transform", load_transform(recipe.corpus.transform)))
    chunk = Chunk([], Tally(read=len(documents)))
    for document in documents:
        cleaned = document
        for name, step in functions:
            before, cleaned = cleaned, cleaned.mapped(step)
            chunk.tally.changed(name, before.text, cleaned.text)
        chunk.tally.sample(document.name, document.text, cleaned.text)
        chunk.documents.append(cleaned)
    return chunk


def _find_boilerplate(chunks: Iterable[Chunk], recipe: Recipe, path: Path, tally: Tally) -> frozenset[str]:
    """Return the boilerplate lines of all chunks, and leave their documents in the file `path`."""
    with path.open("w", encoding="utf-8", newline="\n") as file:

        def texts() -> Iterator[str]:
            for chunk in chunks:
                tally.add(chunk.tally)
                for document in chunk.documents:
                    write_document(file, document)
                    yield document.content

        settings = recipe.cleaning
        return frozenset(boilerplate_lines(texts(), settings.boilerplate_documents, settings.boilerplate_characters))


def _without_boilerplate(recipe: Recipe, unwanted: frozenset[str], documents: list[Document]) -> Chunk:
    def remove(text: str) -> tuple[str, bool]:
        cleaned, removed = remove_lines(text, unwanted)
        if removed and recipe.cleaning.white_space != "keep":
            cleaned, _ = tidy_space(cleaned, words=False)
        return cleaned, removed

    chunk = Chunk([], Tally())
    for document in documents:
        cleaned = document.mapped(remove)
        chunk.tally.changed("boilerplate", document.text, cleaned.text)
        chunk.tally.sample(document.name, document.text, cleaned.text)
        chunk.documents.append(cleaned)
    return _measure(recipe, chunk)


def _clean_and_measure(recipe: Recipe, documents: list[Document]) -> Chunk:
    return _measure(recipe, _clean(recipe, documents))


def _measure(recipe: Recipe, chunk: Chunk) -> Chunk:
    """Trim the documents, leave out those of a wrong length, and give the others their digests and signatures."""
    settings, seed, tally = recipe.corpus, str(recipe.seed).encode(), chunk.tally
    kept: list[Document] = []
    for document in chunk.documents:
        document = document.ended()
        if settings.trim and settings.max_characters:
            trimmed = document.trimmed(settings.max_characters, trim)
            tally.changed("trim", document.text, trimmed.text)
            document = trimmed
        if not document.is_answered:
            tally.dropped["no response"] += 1
        elif document.answer_characters < recipe.min_characters:
            tally.dropped["too short"] += 1
        elif settings.max_characters and len(document.text) > settings.max_characters:
            tally.dropped["too long"] += 1
        else:
            kept.append(document)
    texts = [document.content for document in kept]
    signatures = sign(texts, settings, recipe.seed) if settings.near_duplicates else None
    return Chunk(kept, tally, [_digest(text, seed) for text in texts], signatures)


def _without_repeats(
    chunks: Iterable[Chunk], recipe: Recipe, scratch: Path, tally: Tally
) -> Iterator[tuple[Document, bytes]]:
    copies = Copies(scratch) if recipe.corpus.deduplicate else None
    near = NearDuplicates(recipe.corpus, scratch) if recipe.corpus.near_duplicates else None
    for block in _blocks(chunks, tally):
        stays = np.ones(len(block.documents), np.bool_)
        if copies:
            stays = ~copies.repeats(block.digests)
            tally.dropped["duplicate"] += int((~stays).sum())
        if near and block.signatures is not None:
            repeated = near.repeats(block.signatures[stays])
            tally.dropped["near-duplicate"] += int(repeated.sum())
            stays[stays] = ~repeated
        for place in np.flatnonzero(stays).tolist():
            yield block.documents[place], block.digests[place]
    tally.dropped = +tally.dropped  # Nothing of a kind is no line in the report.


def _blocks(chunks: Iterable[Chunk], tally: Tally) -> Iterator[Chunk]:
    """Join chunks, and count them."""
    parts: list[Chunk] = []
    characters = documents = 0
    for chunk in chunks:
        tally.add(chunk.tally)
        parts.append(chunk)
        characters += sum(len(document.text) for document in chunk.documents)
        documents += len(chunk.documents)
        if characters >= _BLOCK_CHARACTERS or documents >= _BLOCK_DOCUMENTS:
            yield _join(parts)
            parts, characters, documents = [], 0, 0
    if parts:
        yield _join(parts)


def _join(parts: list[Chunk]) -> Chunk:
    signatures = [part.signatures for part in parts if part.signatures is not None]
    return Chunk(
        [document for part in parts for document in part.documents],
        Tally(),
        [digest for part in parts for digest in part.digests],
        np.concatenate(signatures) if signatures else None,
    )


def _fraction(digest: bytes) -> float:
    return int.from_bytes(digest[:6], "big") / 2**48


def _digest(text: str, seed: bytes) -> bytes:
    return hashlib.blake2b(" ".join(text.split()).encode("utf-8"), digest_size=16, key=seed).digest()
