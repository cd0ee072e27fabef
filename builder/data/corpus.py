"""Read, filter_documents and split the documents, and write both sides as JSON lines.

The side of a document depends on its text and the seed only. The same text is on the same side whatever else the corpus
holds, as long as both sides get their share (see `train_split`). `corpus_filtering` says what memory holds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from builder.data.corpus_filtering import Tally, filter_documents, share
from builder.data.documents import Document, read_file, write_document
from builder.data.file_readers import Skipped
from builder.data.label_balance import balance
from builder.data.sources import find_sources, read_documents, read_sources
from builder.data.train_split import Sizes, is_near, refusal, split_by_size
from builder.recipe import Recipe
from serving.errors import InputError

TRAIN, VALIDATION, REPORT, SCRATCH = "train.jsonl", "validation.jsonl", "report.json", "scratch"

_BUILTIN = {"docstrings": "Python standard library docstrings", "chinese": "generated Chinese sentences"}


@dataclass(frozen=True)
class SideReport:
    """One side of the split: its documents and their characters (Unicode code points)."""

    documents: int
    characters: int


@dataclass(frozen=True)
class CorpusReport:
    """What went into the corpus, what was changed or left out and why.

    `cleaning`, `lengths` and `samples` are those of `corpus_filtering.Tally`, `labels` is that of `balance`. `split` is
    "documents", or where their hashes alone missed the share, "documents, by size" or "ends of documents" (see
    `train_split`). `sha256` is that of train.jsonl followed by validation.jsonl.
    """

    source: str
    files: int
    skipped_files: Mapping[str, int]
    documents_read: int
    dropped: Mapping[str, int]
    cleaning: Mapping[str, Mapping[str, int]]
    lengths: Mapping[str, int]
    samples: Sequence[Mapping[str, str]]
    labels: Mapping[str, Mapping[str, int]]
    split: str
    train: SideReport
    validation: SideReport
    sha256: str

    @property
    def documents(self) -> int:
        """Documents kept, both sides together."""
        return self.train.documents + self.validation.documents

    @property
    def characters(self) -> int:
        """Characters kept, both sides together."""
        return self.train.characters + self.validation.characters


def prepare_corpus(recipe: Recipe, folder: Path, workers: int = 1) -> CorpusReport:
    """Read the recipe's documents and write train.jsonl, validation.jsonl and report.json into `folder`.

    The result does not depend on the number of `workers`, processes that clean and compare texts.

    If the share that the documents' hashes hold out is not near `validation_fraction`, `train_split` divides them by
    their sizes. Raises InputError if nothing is left after cleaning, if the text cannot be divided near that share, and
    for what cannot be read.
    """
    settings = recipe.corpus
    bad: Skipped = Counter()
    if settings.paths:
        sources = find_sources(settings.paths)
        documents = read_sources(sources, settings, recipe.instruction, bad)
        source, files, skipped = "files", len(sources.files), sources.skipped
    else:
        documents = read_documents(settings, recipe.instruction)
        source, files, skipped = _BUILTIN[settings.builtin], 0, {}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT).unlink(missing_ok=True)
    tally = Tally()
    kept = filter_documents(documents, recipe, folder / SCRATCH, tally, workers)
    fraction = settings.validation_fraction
    with contextlib.closing(kept):
        sides = _write(folder, ((document, place < fraction) for document, place in kept))
    tally.read += bad.total()
    tally.dropped.update(bad)
    if not sum(side.documents for side in sides):
        reasons = ", ".join(f"{count} {why}" for why, count in tally.dropped.items())
        raise InputError(
            f"corpus: none of the {tally.read} documents read was kept ({reasons}); "
            "name more text in corpus.paths or lower corpus.min_characters"
        )
    split = "documents"
    if not _is_near(sides, fraction):
        split, sides = _split_again(recipe, folder)
    labels: dict[str, dict[str, int]] = {}
    if settings.label_field:
        labels = balance(folder / TRAIN, settings, recipe.seed)
        if settings.balance != "none":
            sides = _measure(folder / TRAIN), sides[1]
    report = CorpusReport(
        source=source,
        files=files,
        skipped_files=skipped,
        documents_read=tally.read,
        dropped=dict(sorted(tally.dropped.items())),
        cleaning=tally.cleaning,
        lengths={str(length): count for length, count in sorted(tally.lengths.items())},
        samples=tally.samples,
        labels=labels,
        split=split,
        train=sides[0],
        validation=sides[1],
        sha256=_sha256(folder / TRAIN, folder / VALIDATION),
    )
    (folder / REPORT).write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n", encoding="utf-8")
    return report


def read_report(folder: Path) -> CorpusReport:
    """Return the report that `prepare_corpus` left in `folder`."""
    record = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    sides = {side: SideReport(**record[side]) for side in ("train", "validation")}
    return CorpusReport(**{**record, **sides})


def iter_texts(path: Path) -> Iterator[str]:
    """Yield the text of each document of a train.jsonl or validation.jsonl that `prepare_corpus` wrote, in order."""
    for document in read_file(path):
        yield document.text


def _write(folder: Path, documents: Iterable[tuple[Document, bool]]) -> tuple[SideReport, SideReport]:
    """Write (document, held out) pairs to the two files, whose old content may be what is being read."""
    paths = [folder / TRAIN, folder / VALIDATION]
    parts = [path.with_suffix(".part") for path in paths]
    counts, characters = [0, 0], [0, 0]
    with ExitStack() as stack:
        files = [stack.enter_context(part.open("w", encoding="utf-8", newline="\n")) for part in parts]
        for document, held_out in documents:
            write_document(files[held_out], document)
            counts[held_out] += 1
            characters[held_out] += len(document.text)
    for part, path in zip(parts, paths, strict=True):
        part.replace(path)
    return SideReport(counts[0], characters[0]), SideReport(counts[1], characters[1])


def _is_near(sides: tuple[SideReport, SideReport], fraction: float) -> bool:
    return is_near(sides[1].characters, sides[0].characters + sides[1].characters, fraction)


def _split_again(recipe: Recipe, folder: Path) -> tuple[str, tuple[SideReport, SideReport]]:
    """Divide the documents of the two files just written by their sizes."""
    fraction, seed = recipe.corpus.validation_fraction, str(recipe.seed).encode()
    sizes = Sizes.of(_read_both(folder), lambda text: share(text, seed))
    sides = _write(folder, split_by_size(sizes, lambda: _read_both(folder), fraction))
    if not _is_near(sides, fraction):
        characters = sides[0].characters, sides[1].characters
        raise refusal(characters, len(sizes.characters), fraction, recipe.training.sequence_length)
    cut = sides[0].documents + sides[1].documents > len(sizes.characters)
    return "ends of documents" if cut else "documents, by size", sides


def _read_both(folder: Path) -> Iterator[Document]:
    yield from read_file(folder / TRAIN)
    yield from read_file(folder / VALIDATION)


def _measure(path: Path) -> SideReport:
    documents, characters = 0, 0
    for text in iter_texts(path):
        documents, characters = documents + 1, characters + len(text)
    return SideReport(documents, characters)


def _sha256(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
