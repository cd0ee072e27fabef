"""A record as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.suite.report.recommendations import Answer, answers, differing
from benchmarks.suite.report.tables import (
    HEADS,
    Point,
    Row,
    at_sustained,
    batch_of,
    client_overhead,
    columns,
    groups,
    median_of,
    name_of,
    over_floor,
    remarks,
    sweep_of,
)


def to_markdown(record: Mapping[str, Any]) -> str:
    """A table a point, a sweep or a grid; bold is better than all others beyond the noise."""
    others = record["others_cpu_share"]
    lines = [] if others is None else [f"Other programs took {others:.1%} of the cores meanwhile.", ""]
    lines += [sentence, ""] if (sentence := client_overhead(record)) else []
    if every := answers(record):
        lines += [*_in_short(every), *([f"- {said}"] if (said := differing(record)) else []), ""]
    for scenario, points in groups(record):
        if scenario == "steps":
            lines += _steps(points)
        elif scenario == "saturation":
            lines += _sweep(points)
        elif scenario == "grid":
            lines += _grid(points)
        else:
            lines += _point(points[0])
        lines += [*(f"- {remark}" for remark in remarks(points)), ""]
    lines += [f"- {name}: not measured: {why}" for name, why in record.get("not_measured", {}).items()]
    return "\n".join(lines)


def _in_short(every: Sequence[Answer]) -> list[str]:
    heads = ["take", "which gives", "first token, ms", "between tokens, ms", "/ floor", "tokens/s", "peak memory, MiB"]
    lines = _head("in short; where several are named, they are not told apart", heads, "for")
    for each in every:
        taken = f"{each.targets[0]} or {each.others}" if each.others else f"**{each.targets[0]}**"
        memory = each.memory_bytes / 2**20 if each.memory_bytes is not None else None
        known = (each.first_token_ms, each.between_tokens_ms, each.over_floor, each.tokens_per_second, memory)
        cells = [taken, f"{_number(each.value)} {each.unit}", *map(_number, known)]
        lines.append(f"| {each.use} | {' | '.join(cells)} |")
    return [*lines, ""]


def _point(point: Point) -> list[str]:
    shown = columns(point)
    floors = "p50_inter_token_ms" in shown
    lines = _head(f"{point['scenario']}: {point['point']}", [HEADS[each] for each in shown] + ["floor, ms"] * floors)
    for row in point["rows"]:
        cells = [_cell(point, row, figure) for figure in shown]
        if floors:
            floor = row["floor_inter_token_ms"]
            cells.append("none" if floor is None else f"{floor:.3f}")
        lines.append(f"| {name_of(row)} | {' | '.join(cells)} |")
    return [*lines, ""]


def _steps(points: Sequence[Point]) -> list[str]:
    shown = columns(points[0])
    heads = ["batch", *(HEADS[each] for each in shown), "floor of a step, ms", "step / floor"]
    lines = _head("steps: the graph alone, in static batches", heads)
    for point in points:
        for row in point["rows"]:
            cells = [batch_of(point), *(_cell(point, row, figure) for figure in shown)]
            cells += [_number(row["floor_inter_token_ms"]), _number(over_floor(row, "step_ms"))]
            lines.append(f"| {name_of(row)} | {' | '.join(cells)} |")
    return [*lines, ""]


def _sweep(points: Sequence[Point]) -> list[str]:
    result = sweep_of(points)
    heads = ["sustains, requests/s", "does not keep up at", "why", "end to end p50, ms", "p99, ms"]
    lines = _head("saturation: highest rate sustained", heads)
    for row in result["rows"] if result is not None else ():
        found, there = row["sweep"], at_sustained(points, row)
        cells = [_cell(result or {}, row, "sustained_requests_per_second"), _number(found["failed_at"])]
        cells += [found["why"] or "not seen to fail"]
        cells += [_number(median_of(there, figure) if there else None) for figure in ("p50_e2e_ms", "p99_e2e_ms")]
        lines.append(f"| {name_of(row)} | {' | '.join(cells)} |")
    return [*lines, ""]


def _grid(points: Sequence[Point]) -> list[str]:
    names = list(dict.fromkeys(name_of(row) for point in points for row in point["rows"]))
    lines = _head("grid: end to end p50, ms", names, "tokens in, out")
    for point in points:
        cells = [_cell(point, row, "p50_e2e_ms") for row in point["rows"]]
        lines.append(f"| {point['point']} | {' | '.join(cells)} |")
    return [*lines, ""]


def _head(title: str, heads: Sequence[str], first: str = "target") -> list[str]:
    return [f"### {title}", "", f"| {first} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]


def _cell(point: Point, row: Row, figure: str) -> str:
    text = _number(median_of(row, figure))
    return f"**{text}**" if point["winners"].get(figure) == row["target"] else text


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:,.2f}" if abs(value) >= 0.1 or not value else f"{value:.3g}"
