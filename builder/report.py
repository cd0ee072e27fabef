"""The data report: one HTML page without scripts or outside references that shows what preparation did."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builder.corpus import CorpusReport

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --bar: #4a7dbd; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; width: 100%; }
th, td { text-align: left; padding: 0.2rem 0.6rem; border-bottom: 1px solid var(--line); }
td.number { text-align: right; font-variant-numeric: tabular-nums; width: 9rem; }
td.bar { width: 50%; }
td.bar span { display: block; height: 0.8rem; background: var(--bar); }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line); padding: 0.5rem; margin: 0; }
"""


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


def render_report(corpus: CorpusReport, summary: Mapping[str, Any]) -> str:
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
        _section("Overview", _table((name, _show(value)) for name, value in overview.items())),
        _section("Dropped documents, by reason", _bars(corpus.dropped)),
        _section("Documents over max_tokens, left out or cut", _bars(summary.get("over_max_tokens", {}))),
        _section(
            "Documents without a response within max_tokens, left out",
            _bars(summary.get("no_response_within_max_tokens", {})),
        ),
        *(
            _section(
                f"What the loss counts, {side}",
                _table((key.replace("_", " "), _show(count)) for key, count in counts.items()),
            )
            for side, counts in summary.get("loss", {}).items()
        ),
        _section("Files of other kinds, skipped", _bars(corpus.skipped_files)),
        _section(
            "Cleaning",
            _table(
                (
                    (step, _show(counts["documents"]), _show(counts["characters_removed"]))
                    for step, counts in corpus.cleaning.items()
                ),
                ("Step", "Documents changed", "Characters removed"),
            ),
        ),
        _section(
            "Length of kept documents, in characters",
            _bars({f"{int(low):,} to {2 * int(low) - 1:,}": count for low, count in corpus.lengths.items()}),
        ),
        _section(
            "Labels on the training side",
            _table(
                (
                    (name or "(none)", _show(counts["before"]), _show(counts["after"]))
                    for name, counts in corpus.labels.items()
                ),
                ("Label", "Documents before balancing", "Documents after"),
            ),
        ),
        _section("Vocabulary", _table((key.replace("_", " "), _show(value)) for key, value in vocabulary.items())),
        _section("Before and after cleaning", "".join(_sample(sample) for sample in corpus.samples)),
    ]
    title = escape(f"Data of {summary['name']}")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{''.join(parts)}</body>\n</html>\n"
    )


def write_report(path: Path, corpus: CorpusReport, summary: Mapping[str, Any]) -> None:
    """Write the page of `render_report` as UTF-8; half a surrogate pair, which UTF-8 has not, becomes `?`."""
    path.write_bytes(render_report(corpus, summary).encode("utf-8", "replace"))


def _count(chunks: Iterable[NDArray[Any]], vocab_size: int) -> NDArray[np.int64]:
    counts = np.zeros(vocab_size, np.int64)
    for chunk in chunks:
        counts += np.bincount(chunk, minlength=vocab_size)
    return counts


def _show(value: int | float | str) -> str:
    return value if isinstance(value, str) else f"{value:,}"


def _section(title: str, content: str) -> str:
    """A heading and its content, or nothing where there is no content."""
    return f"<h2>{escape(title)}</h2>\n{content}" if content else ""


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
    before, after = (f"<pre>{escape(sample[side])}</pre>" for side in ("before", "after"))
    return f'<h3>{escape(sample["name"])}</h3>\n<div class="pair">{before}{after}</div>\n'
