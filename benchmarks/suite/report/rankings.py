"""What a record comes to: who is best at what, and what each target needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.suite.figures.record_rows import HIGHER_IS_BETTER, comparable, judge
from benchmarks.suite.report.tables import Point, median_of, name_of, over_floor

# What is asked of each scenario, and how to a reader.
_ALONE = "one at a time: "
_QUESTIONS = {
    "steps": (("prefill_ms", "{point}: prompts read, ms"), ("step_ms", "{point}: a step, ms")),
    "single": (("p50_ttft_ms", _ALONE + "first token, ms"), ("p50_inter_token_ms", _ALONE + "between tokens, ms")),
    "offline": (("output_tokens_per_second", "{point}: tokens/s"),),
    "server": (("p50_e2e_ms", "{point}: end to end, ms"), ("p99_inter_token_ms", "{point}: between tokens, p99, ms")),
    "concurrency": (("output_tokens_per_second", "{point}: tokens/s"),),
    "saturation": (("sustained_requests_per_second", "sustained, requests/s"),),
    "cold-start": (("cold_first_token_ms", "from the start to the first token, ms"),),
}


@dataclass(frozen=True)
class Ranking:
    """One question of one point.

    `order` is target (marked if a stand-in) to median, the better first; `winner` is better than every other beyond the
    noise, or None. `second` is the second of them over the first: ratio, its 95 % interval and the ratios' noise, None
    for fewer than five repeats.
    """

    question: str
    figure: str
    winner: str | None
    order: tuple[tuple[str, float], ...]
    second: tuple[float, float, float, float] | None


def rankings(record: Mapping[str, Any]) -> list[Ranking]:
    """Each question that two targets or more have a figure for, in the order of the record."""
    return [found for point in record["points"] for found in _ranked(point) if len(found.order) > 1]


def _ranked(point: Point) -> Iterator[Ranking]:
    for figure, words in _QUESTIONS.get(point["scenario"], ()):
        if figure not in point["winners"]:
            continue
        known = comparable(point["rows"], figure)
        rows = [row for row in point["rows"] if row["target"] in known and median_of(row, figure) is not None]
        rows.sort(key=lambda row: median_of(row, figure) or 0.0, reverse=figure in HIGHER_IS_BETTER)
        order = tuple((name_of(row), median_of(row, figure) or 0.0) for row in rows)
        won = next((name_of(row) for row in rows if row["target"] == point["winners"][figure]), None)
        second = _beside(known, figure, rows[1]["target"]) if len(rows) > 1 else None
        yield Ranking(words.format(point=point["point"]), figure, won, order, second)


def _beside(known: Mapping[str, Any], figure: str, target: str) -> tuple[float, float, float, float] | None:
    found = judge(known, figure)
    verdict = found["over_best"].get(target) if found is not None else None
    if verdict is None or verdict["call"] == "unknown":
        return None
    return verdict["ratio"], verdict["low"], verdict["high"], verdict["noise"]


@dataclass(frozen=True)
class Needs:
    """What one target needs. Bytes of the process that does nothing but it; joules over the busiest offline point;
    `over_floor` is a single stream's time between tokens over its floor, `batch_over_floor` that of the largest
    static batch. None for what is not known."""

    target: str
    precision: str | None
    memory_bytes: int | None
    first_token_ms: float | None
    over_floor: float | None
    batch_over_floor: float | None
    joules_per_token: float | None
    cost_per_million_tokens: float | None


def needs(record: Mapping[str, Any]) -> list[Needs]:
    """A line a target, in the order of the record."""
    return [_needs(record, target) for target in record["targets"]]


def _needs(record: Mapping[str, Any], target: Mapping[str, Any]) -> Needs:
    rows = [(point, row) for point in record["points"] for row in point["rows"] if row["target"] == target["name"]]

    def last(scenario: str, ask: Any) -> Any:
        found = [ask(row) for point, row in rows if point["scenario"] == scenario and not row["errors"]]
        return next((value for value in reversed(found) if value is not None), None)

    return Needs(
        name_of({**target, "target": target["name"]}),
        target["precision"],
        max((row["peak_rss_bytes"] for _, row in rows if row["peak_rss_bytes"]), default=None),
        last("cold-start", lambda row: median_of(row, "cold_first_token_ms")),
        last("single", lambda row: over_floor(row, "p50_inter_token_ms")),
        last("steps", lambda row: over_floor(row, "step_ms")),
        last("offline", lambda row: median_of(row, "joules_per_token")),
        last("offline", lambda row: median_of(row, "cost_per_million_tokens")),
    )
