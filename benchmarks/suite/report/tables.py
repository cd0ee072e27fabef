"""What the tables of a record share, and the record as CSV: a line for every figure of every repeat."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.suite.figures.record_rows import COLD, COMPARED, STEPS

HEADS = {
    "p50_ttft_ms": "first token p50, ms",
    "p50_inter_token_ms": "inter-token p50, ms",
    "p99_inter_token_ms": "inter-token p99, ms",
    "p50_e2e_ms": "end to end p50, ms",
    "output_tokens_per_second": "tokens/s",
    "goodput": "goodput, requests/s",
    "prefill_ms": "prefill, ms",
    "step_ms": "decode step, ms",
    "step_tokens_per_second": "tokens/s",
    "cold_load_ms": "until ready, ms",
    "cold_first_token_ms": "to the first token, ms",
    "joules_per_token": "J/token",
    "cpu_watts": "CPU, W",
    "gpu_watts": "GPU, W",
    "gpu_utilisation_percent": "GPU busy, %",
    "peak_gpu_memory_bytes": "GPU memory, MiB",
    "cost_per_million_tokens": "cost of 1M tokens",
}
# Shown where anything is known of them.
_FURTHER = (
    "step_tokens_per_second", "goodput", "joules_per_token", "cpu_watts", "gpu_watts", "gpu_utilisation_percent",
    "peak_gpu_memory_bytes", "cost_per_million_tokens",
)  # fmt: skip
# Several points that are one thing to a reader.
TOGETHER = ("steps", "saturation")
Point = Mapping[str, Any]
Row = Mapping[str, Any]


def name_of(row: Row) -> str:
    """A row's target, marked if it is an emulator."""
    return f"{row['target']} (emulator)" if row["emulator"] else str(row["target"])


def median_of(row: Row | None, figure: str) -> float | None:
    """The median of a figure over the repeats, or None if any repeat has none."""
    values = row["figures"].get(figure) if row is not None else None
    return None if not values or any(value is None for value in values) else float(np.median(values))


def columns(point: Point) -> list[str]:
    """The figures to show of a point: those that are judged, and of the others those that a row has."""
    judged = [figure for figure in (*COMPARED, *COLD, *STEPS) if figure in point["winners"]]
    known = [figure for figure in _FURTHER if any(median_of(row, figure) is not None for row in point["rows"])]
    return judged + known


def groups(record: Mapping[str, Any]) -> Iterator[tuple[str, list[Point]]]:
    """Scenarios with the points that are shown together, in the order of the record."""
    for scenario, points in itertools.groupby(record["points"], key=lambda point: str(point["scenario"])):
        if scenario in TOGETHER:
            yield scenario, list(points)
        else:
            yield from ((scenario, [point]) for point in points)


def sweep_of(points: Sequence[Point]) -> Point | None:
    """The point that says what a sweep came to."""
    return next((point for point in points if point["winners"].keys() == {"sustained_requests_per_second"}), None)


def at_sustained(points: Sequence[Point], row: Row) -> Row | None:
    """The row of a sweep's target at the highest rate that it kept up with."""
    sustained = row["sweep"]["sustained"]
    every = (each for point in points for each in point["rows"] if each["target"] == row["target"] and "pace" in each)
    return next((each for each in every if sustained is not None and each["pace"]["offered"] == sustained), None)


def notes(row: Row) -> list[str]:
    """What a reader must know of a row before its figures."""
    found = []
    if row["errors"]:
        summary = row["summary"]
        count = f"{summary['failed']} of {summary['requests']} requests failed: " if summary else ""
        found.append(f"{count}{row['errors'][0]}")
    if not row["all_counted"]:
        found.append("tokens were not counted one by one")
    return found + list(row["notes"])


def agreement(point: Point) -> str:
    """Return which targets of one precision gave other outputs at a point; "" if they all agree.

    Targets of different precisions may give different outputs.
    """
    told = []
    for precision in dict.fromkeys(row["precision"] for row in point["rows"]):
        groups: list[list[Row]] = []
        for row in (each for each in point["rows"] if each["precision"] == precision):
            alike = (found for found in groups if not any(row["differing_requests"].get(o["target"]) for o in found))
            group = next(alike, None)
            if group is None:
                groups.append([row])
            else:
                group.append(row)
        if len(groups) > 1:
            told.append(f"{precision or 'one'} precision: " + " | ".join(", ".join(map(name_of, g)) for g in groups))
    return f"OUTPUTS DIFFER within {'; '.join(told)}" if told else ""


def remarks(points: Sequence[Point]) -> list[str]:
    """What a reader must know of points that are shown together, each sentence once."""
    # Where targets have left a sweep, those that are there are a part of what was said before.
    most = max(len(point["rows"]) for point in points)
    found = [agreement(point) for point in points if len(point["rows"]) == most and agreement(point)]
    found += [f"{name_of(row)}: {note}" for point in points for row in point["rows"] for note in notes(row)]
    return list(dict.fromkeys(found))


def client_overhead(record: Mapping[str, Any]) -> str:
    """What this suite's own client adds to the latencies of a server, as a sentence; nothing where there is none."""
    found = record.get("client_overhead_ms")
    if not found:
        return ""
    first, gap, whole = (found[name] for name in ("ttft_ms", "inter_token_ms", "e2e_ms"))
    return (
        f"Against a server that has nothing to do the client itself takes {first[0]:.2f} ms to the first token "
        f"(p99 {first[2]:.2f}), {gap[0]:.2f} between tokens ({gap[2]:.2f}) and {whole[0]:.2f} in all ({whole[2]:.2f})."
    )


def over_bound(row: Row | None, figure: str) -> float | None:
    """Return a time between tokens over its roofline bound, or None."""
    bound, value = row["bound_inter_token_ms"] if row is not None else None, median_of(row, figure)
    return value / bound if bound and value is not None else None


def shorter(value: float | None, nothing: str = "none") -> str:
    """Return three significant digits, or `nothing`."""
    if value is None:
        return nothing
    size = abs(value)
    digits = ",.0f" if size >= 100 else ".1f" if size >= 10 else ".2f" if size >= 0.1 else ".3g"
    return format(value, digits)


def to_csv(record: Mapping[str, Any]) -> str:
    """scenario, point, target, emulator, figure, repeat, value; an empty value is none."""
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow(("scenario", "point", "target", "emulator", "figure", "repeat", "value"))
    for point in record["points"]:
        for row in point["rows"]:
            for figure, values in row["figures"].items():
                for repeat, value in enumerate(values):
                    place = (point["scenario"], point["point"], row["target"], row["emulator"])
                    writer.writerow((*place, figure, repeat, "" if value is None else value))
    return output.getvalue()
