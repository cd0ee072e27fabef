"""A record as Markdown, and its verdict as lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.suite.report.rankings import differing, rankings, recommendations
from benchmarks.suite.report.sections import Section, sections
from benchmarks.suite.report.tables import client_overhead, shorter


def to_markdown(record: Mapping[str, Any]) -> str:
    """Return every section; bold is better than all others beyond the noise."""
    others = record["others_cpu_share"]
    lines = [] if others is None else [f"Other programs took {others:.1%} of the cores meanwhile.", ""]
    lines += [sentence, ""] if (sentence := client_overhead(record)) else []
    return "\n".join([*lines, *(line for each in sections(record) for line in _lines(each))])


def verdict(record: Mapping[str, Any]) -> list[str]:
    """Return one line for each ranking and recommendation, and one on the outputs."""
    lines = []
    for each in rankings(record):
        if each.winner:
            (_, value), (second, other) = each.order[:2]
            lines.append(f"{each.question}: {each.winner} is best: {shorter(value)}, {second} {shorter(other)}")
        else:
            named = ", ".join(f"{name} {shorter(value)}" for name, value in each.order if name in each.alike)
            lines.append(f"{each.question}: {each.call}: {named}")
    for recommended in recommendations(record):
        taken = " or ".join(filter(None, (recommended.targets[0], recommended.others)))
        lines.append(f"{recommended.use}: take {taken}: {shorter(recommended.value)} {recommended.unit}")
    return [*lines, differing(record) or "all targets of one precision gave the same outputs"]


def _lines(each: Section) -> Iterator[str]:
    yield from (f"### {each.title}", "", f"| {' | '.join(each.heads)} |", "|---" * len(each.heads) + "|")
    for row in each.rows:
        yield f"| {' | '.join(f'**{cell.text}**' if cell.best else cell.text.replace('|', '/') for cell in row)} |"
    yield ""
    yield from (line for note in each.notes for line in (f"- {note}",))
    yield ""
