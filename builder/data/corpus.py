"""Read, curate and split the documents, and write both sides as JSON lines.

Which side a document falls on depends on its text and the seed only, so the same text is always on the same side,
whatever else the corpus holds. Memory holds what `curation` says.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from builder.data.curation import Tally, curate, share
from builder.data.documents import Document, read_file, write_document
from builder.data.label_balance import balance
from builder.data.sources import find_sources, read_documents, read_sources
from builder.recipe import Recipe
from serving.errors import InputError

TRAIN, VALIDATION, REPORT = "train.jsonl", "validation.jsonl", "report.json"


@dataclass(frozen=True)
class SideReport:
    """One side of the split: its documents and their characters (Unicode code points)."""

    documents: int
    characters: int


@dataclass(frozen=True)
class CorpusReport:
    """What went into the corpus, what was changed or left out and why.

    `cleaning`, `lengths` and `samples` are those of `curation.Tally`, `labels` is that of `balance`. `split` is
    "documents", or "lines" or "one document" where whole documents chosen by hash could not fill both sides (see
    `prepare_corpus`). `sha256` is that of train.jsonl followed by validation.jsonl.
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

    Chance may give one side nothing, or far too little or too much, when a corpus is a few documents or one large one.
    If the held-out share of the characters is not within a factor of five of `validation_fraction`, each document's
    last lines are held out instead; if no document has two lines, the one document with the lowest hash is. Raises
    InputError if nothing is left after cleaning, if the text cannot fill two sides, and for what cannot be read.
    """
    settings = recipe.corpus
    if settings.paths:
        sources = find_sources(settings.paths)
        documents = read_sources(sources, settings, recipe.instruction)
        source, files, skipped = "files", len(sources.files), sources.skipped
    else:
        documents = read_documents(settings, recipe.instruction)
        source, files, skipped = "Python standard library docstrings", 0, {}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT).unlink(missing_ok=True)
    tally = Tally()
    kept = curate(documents, recipe, folder / "scratch", tally, workers)
    fraction = settings.validation_fraction
    with contextlib.closing(kept):
        sides = _write(folder, ((document, place < fraction) for document, place in kept))
    if not sum(side.documents for side in sides):
        reasons = ", ".join(f"{count} {why}" for why, count in tally.dropped.items())
        raise InputError(
            f"corpus: none of the {tally.read} documents read was kept ({reasons}); "
            "name more text in corpus.paths or lower corpus.min_characters"
        )
    split = "documents"
    if not _balanced(sides, fraction):
        split, sides = _split_again(recipe, folder, sides)
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


def _balanced(sides: tuple[SideReport, SideReport], fraction: float) -> bool:
    held_out = sides[1].characters / max(1, sides[0].characters + sides[1].characters)
    return fraction / 5 <= held_out <= min(5 * fraction, (1 + fraction) / 2)


def _split_again(
    recipe: Recipe, folder: Path, sides: tuple[SideReport, SideReport]
) -> tuple[str, tuple[SideReport, SideReport]]:
    """Split the two files just written anew: by lines, else one document against the rest."""
    fraction = recipe.corpus.validation_fraction
    by_lines = _write(folder, _cut_documents(_read_both(folder), fraction))
    if by_lines[0].documents and by_lines[1].documents:
        return "lines", by_lines
    total = sum(side.documents for side in sides)
    if total > 1:
        seed = str(recipe.seed).encode()
        shares = ((share(document.content, seed), index) for index, document in enumerate(_read_both(folder)))
        chosen = min(shares)[1]
        pairs = ((document, index == chosen) for index, document in enumerate(_read_both(folder)))
        return "one document", _write(folder, pairs)
    raise InputError(
        f"corpus: one document of one line ({by_lines[0].characters} characters) cannot be split into training and "
        "validation text; name at least two documents or lines, and some "
        f"{8 * recipe.training.sequence_length} characters to fill a row of {recipe.training.sequence_length} tokens"
    )


def _cut_documents(documents: Iterable[Document], fraction: float) -> Iterator[tuple[Document, bool]]:
    """Hold out the last lines of each document, at least `fraction` of its characters."""
    for document in documents:
        text = document.text
        target = int(len(text) * (1 - fraction))
        before, after = text.rfind("\n", 0, target) + 1, text.find("\n", target) + 1
        for cut in (before, after):
            if not document.segments and text[:cut].strip() and text[cut:].strip():
                yield Document(document.name, text[:cut], document.label), False
                yield Document(f"{document.name} (end)", text[cut:], document.label), True
                break
        else:
            yield document, False


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
