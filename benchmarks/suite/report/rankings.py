"""Rankings: which target is best in which metric, and what each target needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.common.statistics import SAME, UNKNOWN
from benchmarks.suite.figures.record_rows import HIGHER_IS_BETTER, comparable, comparison
from benchmarks.suite.report.tables import Point, Row, median_of, name_of, over_bound

# What is asked of each scenario.
_ALONE = "one at a time: "
_QUESTIONS = {
    "steps": (("prefill_ms", "{point}: prefill, ms"), ("step_ms", "{point}: decode step, ms")),
    "single": (("p50_ttft_ms", _ALONE + "first token, ms"), ("p50_inter_token_ms", _ALONE + "between tokens, ms")),
    "offline": (("output_tokens_per_second", "{point}: tokens/s"),),
    "server": (("p50_e2e_ms", "{point}: end to end, ms"), ("p99_inter_token_ms", "{point}: between tokens, p99, ms")),
    "concurrency": (("output_tokens_per_second", "{point}: tokens/s"),),
    "saturation": (("sustained_requests_per_second", "sustained, requests/s"),),
    "cold-start": (("cold_first_token_ms", "from process start to first token, ms"),),
}


@dataclass(frozen=True)
class Ranking:
    """One question of one point.

    `order` is target (marked if an emulator) to median, the better first. `winner` is better than every other beyond
    the noise, or None; then `alike` are the first and those that are not distinguishable from it, and `call` is why.
    `second` is the second of them over the first: ratio, its 95 % interval and the ratios' noise, or None.
    """

    question: str
    figure: str
    winner: str | None
    order: tuple[tuple[str, float], ...]
    second: tuple[float, float, float, float] | None
    alike: tuple[str, ...] = ()
    call: str = SAME


def rankings(record: Mapping[str, Any]) -> list[Ranking]:
    """Return each question for which two targets or more have a figure, in the order of the record."""
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
        found = comparison(known, figure) if point["scenario"] != "saturation" else None
        verdicts = found["over_best"] if found is not None else {}
        best = rows[0]["sweep"]["sustained"] if rows and point["scenario"] == "saturation" else None
        alike = [row for row in rows[1:] if _is_alike(row, verdicts, best)]
        few = any(verdict["call"] == UNKNOWN for verdict in verdicts.values())
        second = verdicts.get(rows[1]["target"]) if len(rows) > 1 else None
        yield Ranking(
            words.format(point=point["point"]),
            figure,
            won,
            order,
            None
            if second is None or second["call"] == UNKNOWN
            else (second["ratio"], second["low"], second["high"], second["noise"]),
            tuple(name_of(row) for row in (*rows[:1], *alike)),
            UNKNOWN if few else SAME,
        )


def _is_alike(row: Row, verdicts: Mapping[str, Any], best_rate: float | None) -> bool:
    """Whether a row is not distinguishable from the best: a sweep plays each rate once, so by where it failed."""
    if best_rate is not None:
        return row["sweep"]["failed_at"] is None or bool(row["sweep"]["failed_at"] >= best_rate)
    return row["target"] in verdicts and verdicts[row["target"]]["call"] in (SAME, UNKNOWN)


@dataclass(frozen=True)
class Needs:
    """What one target needs; None for what is not known.

    `memory_bytes` are those of a process that does nothing else; `over_bound` is a single stream's time between tokens
    over its roofline bound, `batch_over_bound` that of the largest static batch. Energy and cost are those of the last
    offline point.
    """

    target: str
    precision: str | None
    memory_bytes: int | None
    first_token_ms: float | None
    over_bound: float | None
    batch_over_bound: float | None
    joules_per_token: float | None
    cost_per_million_tokens: float | None


def needs(record: Mapping[str, Any]) -> list[Needs]:
    """Return one entry for each target, in the order of the record."""
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
        last("single", lambda row: over_bound(row, "p50_inter_token_ms")),
        last("steps", lambda row: over_bound(row, "step_ms")),
        last("offline", lambda row: median_of(row, "joules_per_token")),
        last("offline", lambda row: median_of(row, "cost_per_million_tokens")),
    )
