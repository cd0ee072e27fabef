"""Recommendations: the target to take for each use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.common.statistics import SAME, UNKNOWN
from benchmarks.suite.figures.record_rows import comparable, comparison
from benchmarks.suite.report.rankings import Needs, needs
from benchmarks.suite.report.tables import Point, Row, agreement, at_sustained, median_of, name_of, over_bound, sweep_of

_RATE = "output_tokens_per_second"
_MOST_NAMED = 3


@dataclass(frozen=True)
class Recommendation:
    """One use and what is best for it.

    `targets` starts with the best one; the others are not distinguishable from it. The rest belongs to the first:
    `value` of the metric in `unit`, medians in ms and tokens a second at the point that decided, memory in bytes of a
    process that does nothing else, and the time between tokens over its roofline bound. None is not known.
    """

    use: str
    targets: tuple[str, ...]
    value: float
    unit: str
    first_token_ms: float | None = None
    between_tokens_ms: float | None = None
    tokens_per_second: float | None = None
    over_bound: float | None = None
    joules_per_token: float | None = None
    precision: str | None = None
    memory_bytes: int | None = None

    @property
    def others(self) -> str:
        """Those that are not distinguishable from the first, up to three by name; empty where it is best."""
        rest = self.targets[1:]
        more = f", and {len(rest) - _MOST_NAMED} more" if len(rest) > _MOST_NAMED else ""
        return ", ".join(rest[:_MOST_NAMED]) + more


def recommendations(record: Mapping[str, Any]) -> list[Recommendation]:
    """Return one for each use for which two targets or more were measured, in the order of the scenarios."""
    known = {each.target: each for each in needs(record)}
    points: Sequence[Point] = record["points"]
    found = [_recommend(point, "p50_e2e_ms", "one at a time", "ms a request") for point in _of(points, "single")]
    found += [_recommend(point, "p50_e2e_ms", point["point"], "ms a request") for point in _of(points, "server")]
    found.append(_most_tokens(points))
    found.append(_sustained(points))
    cold = ("cold_first_token_ms", "from a cold start", "ms to the first token")
    found += [_recommend(point, *cold) for point in _of(points, "cold-start")]
    found.append(_least_memory(list(known.values())))
    return [_with_needs(each, known) for each in found if each is not None]


def differing(record: Mapping[str, Any]) -> str:
    """Return which targets of one precision gave other outputs, at the largest point or else where; "" for none."""
    points: Sequence[Point] = record["points"]
    sentence = agreement(max(points, key=lambda point: len(point["rows"]))) if points else ""
    apart = list(dict.fromkeys(f"{point['scenario']}, {point['point']}" for point in points if agreement(point)))
    return sentence or (f"OUTPUTS DIFFER at {'; '.join(apart)}" if apart else "")


def _of(points: Sequence[Point], *scenarios: str) -> Iterator[Point]:
    return (point for point in points if point["scenario"] in scenarios)


def _recommend(point: Point, figure: str, use: str, unit: str) -> Recommendation | None:
    found = comparison(comparable(point["rows"], figure), figure)
    if found is None:
        return None
    rows = {row["target"]: row for row in point["rows"]}
    best = rows[found["best"]]
    alike = [name for name, verdict in found["over_best"].items() if verdict["call"] in (SAME, UNKNOWN)]
    alike.sort(key=lambda name: median_of(rows[name], figure) or 0.0, reverse=figure == _RATE)
    return _described(use, [best, *(rows[name] for name in alike)], median_of(best, figure) or 0.0, unit, best)


def _described(use: str, rows: Sequence[Row], value: float, unit: str, there: Row | None) -> Recommendation:
    """The recommendation of `rows`, with the figures of `there`."""
    names = tuple(map(name_of, rows))
    if there is None:
        return Recommendation(use, names, value, unit)
    return Recommendation(
        use,
        names,
        value,
        unit,
        median_of(there, "p50_ttft_ms"),
        median_of(there, "p50_inter_token_ms") if there["all_counted"] else None,
        median_of(there, _RATE),
        over_bound(there, "p50_inter_token_ms") if there["all_counted"] else None,
        median_of(there, "joules_per_token"),
    )


def _most_tokens(points: Sequence[Point]) -> Recommendation | None:
    crowds = _of(points, "offline", "concurrency")
    every = [_recommend(point, _RATE, f"most tokens: {point['point']}", "tokens/s") for point in crowds]
    return max((each for each in every if each is not None), key=lambda each: each.value, default=None)


def _sustained(points: Sequence[Point]) -> Recommendation | None:
    sweep = list(_of(points, "saturation"))
    result = sweep_of(sweep)
    rows = [row for row in result["rows"] if row["sweep"]["sustained"] is not None] if result is not None else []
    if result is None or len(result["rows"]) < 2 or not rows:
        return None
    rows.sort(key=lambda row: row["sweep"]["sustained"], reverse=True)
    best = rows[0]["sweep"]["sustained"]
    # As `rate_sweep.best`: each rate was played once, so only a target that failed below it is distinguishable.
    alike = [row for row in rows[1:] if (failed := row["sweep"]["failed_at"]) is None or failed >= best]
    there = at_sustained(sweep, rows[0])
    return _described("highest rate kept up with", [rows[0], *alike], best, "requests/s", there)


def _least_memory(every: Sequence[Needs]) -> Recommendation | None:
    found = sorted((each.memory_bytes, each.target) for each in every if each.memory_bytes is not None)
    if len(found) < 2:
        return None
    return Recommendation("least memory", (found[0][1],), found[0][0] / 2**20, "MiB")


def _with_needs(recommended: Recommendation, known: Mapping[str, Needs]) -> Recommendation:
    need = known[recommended.targets[0]]
    told = {"precision": need.precision, "memory_bytes": need.memory_bytes}
    return Recommendation(**{**vars(recommended), **told})
