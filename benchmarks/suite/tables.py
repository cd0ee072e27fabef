"""A record as Markdown, and as CSV with a line for every figure of every repeat."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.suite.measure import JUDGED

_HEADS = ("TTFT p50, ms", "inter-token p50, ms", "inter-token p99, ms", "end to end p50, ms", "tokens/s")


def name_of(row: Mapping[str, Any]) -> str:
    """A row's target, marked where it only stands for what it is named after."""
    return f"{row['target']} (stand-in)" if row["stand_in"] else str(row["target"])


def median_of(row: Mapping[str, Any], figure: str) -> float | None:
    """The median of a figure over the repeats, or None if any repeat has none."""
    values = row["figures"][figure]
    return None if not values or any(value is None for value in values) else float(np.median(values))


def notes(row: Mapping[str, Any]) -> list[str]:
    """What a reader must know of a row before its figures."""
    found = []
    if row["errors"]:
        found.append(f"{row['summary']['failed']} of {row['summary']['requests']} requests failed: {row['errors'][0]}")
    if row["repeats_differ"]:
        found.append("its own repeats gave other tokens")
    if not row["all_counted"]:
        found.append("tokens were not counted one by one")
    return found


def agreement(point: Mapping[str, Any]) -> str:
    """A sentence on whether all targets of a point answered alike, and if not, which did."""
    groups: list[list[Mapping[str, Any]]] = []
    for row in point["rows"]:
        alike = (group for group in groups if not any(row["differing_requests"][each["target"]] for each in group))
        group = next(alike, None)
        if group is None:
            groups.append([row])
        else:
            group.append(row)
    if len(groups) < 2:
        return ""
    return "OUTPUTS DIFFER; alike are: " + "; ".join(", ".join(map(name_of, group)) for group in groups)


def to_markdown(record: Mapping[str, Any]) -> str:
    """A table a point; bold is better than all others beyond the noise."""
    lines = []
    for point in record["points"]:
        lines += [f"### {point['scenario']}: {point['point']}", "", f"| target | {' | '.join(_HEADS)} | floor, ms |"]
        lines.append("|---" * (len(_HEADS) + 2) + "|")
        for row in point["rows"]:
            cells = []
            for figure in JUDGED:
                value = median_of(row, figure)
                text = "none" if value is None else f"{value:,.2f}"
                cells.append(f"**{text}**" if point["winners"][figure] == row["target"] else text)
            floor = row["floor_inter_token_ms"]
            cells.append("none" if floor is None else f"{floor:.3f}")
            lines.append(f"| {name_of(row)} | {' | '.join(cells)} |")
        lines.append("")
        lines += [f"- {agreement(point)}"] if agreement(point) else []
        lines += [f"- {name_of(row)}: {note}" for row in point["rows"] for note in notes(row)]
        lines.append("")
    lines += [f"- {name}: not measured: {why}" for name, why in record.get("not_measured", {}).items()]
    return "\n".join(lines)


def to_csv(record: Mapping[str, Any]) -> str:
    """scenario, point, target, stand_in, figure, repeat, value; an empty value is none."""
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow(("scenario", "point", "target", "stand_in", "figure", "repeat", "value"))
    for point in record["points"]:
        for row in point["rows"]:
            for figure, values in row["figures"].items():
                for repeat, value in enumerate(values):
                    place = (point["scenario"], point["point"], row["target"], row["stand_in"])
                    writer.writerow((*place, figure, repeat, "" if value is None else value))
    return output.getvalue()
