"""The data report: one HTML page without scripts or outside references that shows what preparation did."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builder.data.corpus import CorpusReport
from serving.support.html_page import language_attribute, page, section


def vocabulary_coverage(
    train: Iterable[NDArray[Any]], validation: Iterable[NDArray[Any]], vocab_size: int
) -> dict[str, int]:
    """Return how many of a vocabulary's entries each side uses, and of the validation tokens, how many are of entries
    that training never sees. `train` and `validation` are chunks of ids; memory holds 8 bytes an entry and a chunk."""
    seen, held_out = (_count(side, vocab_size) for side in (train, validation))
    return {
        "entries": vocab_size,
        "used_in_training": int((seen > 0).sum()),
        "used_in_validation": int((held_out > 0).sum()),
        "validation_tokens_unseen_in_training": int(held_out[seen == 0].sum()),
    }


def render_report(corpus: CorpusReport, summary: Mapping[str, Any]) -> bytes:
    """Return the page for a corpus report and the summary of prepare.json; every text in it is escaped."""
    tokens, vocabulary = summary["tokens"], summary["vocabulary"]
    overview = {
        "Documents read": corpus.documents_read,
        "Documents for training": corpus.train.documents,
        "Documents for validation": corpus.validation.documents,
        "Characters for training": corpus.train.characters,
        "Characters for validation": corpus.validation.characters,
        "Tokens for training": tokens["train"],
        "Tokens for validation": tokens["validation"],
        "Characters a token": summary["characters_per_token"],
        "Split by": corpus.split,
    }
    parts = [
        section("Overview", _table((name, _show(value)) for name, value in overview.items())),
        section("Dropped documents, by reason", _bars(corpus.dropped)),
        section("Documents over max_tokens, left out or cut", _bars(summary.get("over_max_tokens", {}))),
        section(
            "Documents without a response within max_tokens, left out",
            _bars(summary.get("no_response_within_max_tokens", {})),
        ),
        *(
            section(
                f"What the loss counts, {side}",
                _table((key.replace("_", " "), _show(count)) for key, count in counts.items()),
            )
            for side, counts in summary.get("loss", {}).items()
        ),
        section("Files of other kinds, skipped", _bars(corpus.skipped_files)),
        section(
            "Cleaning",
            _table(
                (
                    (step, _show(counts["documents"]), _show(counts["characters_removed"]))
                    for step, counts in corpus.cleaning.items()
                ),
                ("Step", "Documents changed", "Characters removed"),
            ),
        ),
        section(
            "Length of kept documents, in characters",
            _bars({f"{int(low):,} to {2 * int(low) - 1:,}": count for low, count in corpus.lengths.items()}),
        ),
        section(
            "Labels on the training side",
            _table(
                (
                    (name or "(none)", _show(counts["before"]), _show(counts["after"]))
                    for name, counts in corpus.labels.items()
                ),
                ("Label", "Documents before balancing", "Documents after"),
            ),
        ),
        section("Vocabulary", _table((key.replace("_", " "), _show(value)) for key, value in vocabulary.items())),
        section("Before and after cleaning", "".join(_sample(sample) for sample in corpus.samples)),
    ]
    return page(f"Data of {summary['name']}", "".join(parts))


def write_report(path: Path, corpus: CorpusReport, summary: Mapping[str, Any]) -> None:
    """Write the page of `render_report`."""
    path.write_bytes(render_report(corpus, summary))


def _count(chunks: Iterable[NDArray[Any]], vocab_size: int) -> NDArray[np.int64]:
    counts = np.zeros(vocab_size, np.int64)
    for chunk in chunks:
        counts += np.bincount(chunk, minlength=vocab_size)
    return counts


def _show(value: int | float | str) -> str:
    return value if isinstance(value, str) else f"{value:,}"


def _table(rows: Iterable[tuple[str, ...]], head: tuple[str, ...] = ()) -> str:
    body = ""
    for name, *cells in rows:
        numbers = "".join(f'<td class="number">{escape(cell)}</td>' for cell in cells)
        body += f"<tr><th>{escape(name)}</th>{numbers}</tr>\n"
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    first = f"<tr>{top}</tr>\n" if head else ""
    return f"<table>\n{first}{body}</table>\n" if body else ""


def _bars(counts: Mapping[str, int]) -> str:
    rows = "".join(
        f'<tr><th>{escape(name)}</th><td class="number">{count:,}</td>'
        f'<td class="bar"><span style="width: {100 * count / max(counts.values()):.1f}%"></span></td></tr>\n'
        for name, count in counts.items()
        if count
    )
    return f"<table>\n{rows}</table>\n" if rows else ""


def _sample(sample: Mapping[str, str]) -> str:
    before, after = (
        f"<pre{language_attribute(sample[side])}>{escape(sample[side])}</pre>" for side in ("before", "after")
    )
    return f'<h3>{escape(sample["name"])}</h3>\n<div class="pair">{before}{after}</div>\n'
