"""Rankings: which target is best in which metric, what to take for which use, and what each target needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.common.statistics import SAME, UNKNOWN
from benchmarks.suite.figures.record_rows import HIGHER_IS_BETTER, comparable, comparison
from benchmarks.suite.report.tables import Point, Row, agreement, at_sustained, median_of, name_of, over_bound

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
# Uses, with the figure that decides and its unit. Of those that begin alike, "most tokens", the best point is taken.
_USES = {
    "single": ("p50_e2e_ms", "{point}", "ms a request"),
    "server": ("p50_e2e_ms", "{point}", "ms a request"),
    "offline": ("output_tokens_per_second", "most tokens: {point}", "tokens/s"),
    "concurrency": ("output_tokens_per_second", "most tokens: {point}", "tokens/s"),
    "saturation": ("sustained_requests_per_second", "highest rate kept up with", "requests/s"),
    "cold-start": ("cold_first_token_ms", "from a cold start", "ms to the first token"),
}
_MEMORY = "peak memory, MiB"
_MOST_NAMED = 3
Known = dict[str, float | None]


@dataclass(frozen=True)
class Ranking:
    """One question of one point.

    `rows` are those of the targets with the figure, the better first, and `order` their names (marked if an emulator)
    and medians. `winner` is better than every other beyond the noise, or None; `alike` are the first and those that are
    not distinguishable from it, and `call` is why. `second` is the second of them over the first: ratio, its 95 %
    interval and the ratios' noise, or None.
    """

    question: str
    rows: Sequence[Row]
    order: Sequence[tuple[str, float]]
    winner: str | None
    second: tuple[float, float, float, float] | None
    alike: Sequence[str]
    call: str


def rank(point: Point, figure: str, question: str) -> Ranking | None:
    """Return the ranking of a point's targets by a figure; None for fewer than two with it."""
    known = comparable(point["rows"], figure)
    rows = [row for row in point["rows"] if row["target"] in known and median_of(row, figure) is not None]
    rows.sort(key=lambda row: median_of(row, figure) or 0.0, reverse=figure in HIGHER_IS_BETTER)
    if len(rows) < 2:
        return None
    verdicts: Mapping[str, Any] = {}
    if point["scenario"] == "saturation":
        # A sweep plays each rate once, so only a target that failed below the best rate is distinguishable.
        best, failed = rows[0]["sweep"]["sustained"], [row["sweep"]["failed_at"] for row in rows[1:]]
        alike = [row for row, rate in zip(rows[1:], failed, strict=True) if rate is None or rate >= best]
    else:
        verdicts = (comparison(known, figure) or {"over_best": {}})["over_best"]
        alike = [row for row in rows[1:] if verdicts[row["target"]]["call"] in (SAME, UNKNOWN)]
    second = verdicts.get(rows[1]["target"], {"call": UNKNOWN})
    winner = point.get("winners", {}).get(figure)
    return Ranking(
        question.format(point=point["point"]),
        rows,
        [(name_of(row), median_of(row, figure) or 0.0) for row in rows],
        next((name_of(row) for row in rows if row["target"] == winner), None),
        None if second["call"] == UNKNOWN else (second["ratio"], second["low"], second["high"], second["noise"]),
        tuple(name_of(row) for row in (rows[0], *alike)),
        UNKNOWN if any(verdict["call"] == UNKNOWN for verdict in verdicts.values()) else SAME,
    )


def rankings(record: Mapping[str, Any]) -> list[Ranking]:
    """Return each question for which two targets or more have a figure, in the order of the record."""
    found = []
    for point in record["points"]:
        for figure, question in _QUESTIONS.get(point["scenario"], ()):
            found.append(rank(point, figure, question) if figure in point["winners"] else None)
    return [each for each in found if each is not None]


@dataclass(frozen=True)
class Recommendation:
    """One use and what is best for it.

    `targets` starts with the best one; the others are not distinguishable from it. The rest belongs to the first:
    `value` of the metric in `unit`, and `figures`, by their heads in tables: medians at the point that decided, and the
    memory of a process that does nothing else. None is not known.
    """

    use: str
    targets: Sequence[str]
    value: float
    unit: str
    figures: Known

    @property
    def others(self) -> str:
        """Those that are not distinguishable from the first, up to three by name; empty where it is best."""
        rest = self.targets[1:]
        more = f", and {len(rest) - _MOST_NAMED} more" if len(rest) > _MOST_NAMED else ""
        return ", ".join(rest[:_MOST_NAMED]) + more


def recommendations(record: Mapping[str, Any]) -> list[Recommendation]:
    """Return one for each use for which two targets or more were measured, in the order of the scenarios."""
    known, found = needs(record), []
    for scenario, (figure, use, unit) in _USES.items():
        points = [point for point in record["points"] if point["scenario"] == scenario]
        for point in points:
            ranking = rank(point, figure, use)
            if ranking is None or (scenario == "saturation" and figure not in point["winners"]):
                continue
            best = ranking.rows[0]
            there = at_sustained(points, best) if scenario == "saturation" else best
            figures = _figures(there, known[name_of(best)][_MEMORY])
            found.append(Recommendation(ranking.question, ranking.alike, ranking.order[0][1], unit, figures))
    crowds = [each for each in found if each.unit == "tokens/s"]
    most = max(crowds, key=lambda each: each.value, default=None)
    found = [each for each in found if each not in crowds or each is most]
    memory = sorted((each[_MEMORY] or 0.0, name) for name, each in known.items() if each[_MEMORY])
    if len(memory) > 1:
        size, name = memory[0]
        found.append(Recommendation("least memory", (name,), size, "MiB", _figures(None, size)))
    return found


def _figures(row: Row | None, memory: float | None) -> Known:
    steady = row if row is not None and row["all_counted"] else None
    return {
        "first token, ms": median_of(row, "p50_ttft_ms"),
        "between tokens, ms": median_of(steady, "p50_inter_token_ms"),
        "/ bound": over_bound(steady, "p50_inter_token_ms"),
        "tokens/s": median_of(row, "output_tokens_per_second"),
        _MEMORY: memory,
        "J/token": median_of(row, "joules_per_token"),
    }


def needs(record: Mapping[str, Any]) -> dict[str, Known]:
    """Return what each target needs by its heads in tables, in the order of the record; None for what is not known.

    Memory is that of a process that does nothing else; times over their bound are a single stream's between tokens, and
    a step's of the largest static batch. Energy and cost are those of the last offline point.
    """
    return {name_of({**target, "target": target["name"]}): _needs(record, target) for target in record["targets"]}


def _needs(record: Mapping[str, Any], target: Mapping[str, Any]) -> Known:
    rows = [(point, row) for point in record["points"] for row in point["rows"] if row["target"] == target["name"]]

    def last(scenario: str, figure: str, ask: Any = median_of) -> float | None:
        found = [ask(row, figure) for point, row in rows if point["scenario"] == scenario and not row["errors"]]
        return next((value for value in reversed(found) if value is not None), None)

    memory = max((row["peak_rss_bytes"] for _, row in rows if row["peak_rss_bytes"]), default=None)
    return {
        _MEMORY: memory and memory / 2**20,
        "cold start to first token, ms": last("cold-start", "cold_first_token_ms"),
        "between tokens / bound": last("single", "p50_inter_token_ms", over_bound),
        "step of the largest batch / bound": last("steps", "step_ms", over_bound),
        "J/token": last("offline", "joules_per_token"),
        "cost of 1M tokens": last("offline", "cost_per_million_tokens"),
    }


def differing(record: Mapping[str, Any]) -> str:
    """Return which targets of one precision gave other outputs, at the largest point or else where; "" for none."""
    points: Sequence[Point] = record["points"]
    sentence = agreement(max(points, key=lambda point: len(point["rows"]))) if points else ""
    apart = list(dict.fromkeys(f"{point['scenario']}, {point['point']}" for point in points if agreement(point)))
    return sentence or (f"OUTPUTS DIFFER at {'; '.join(apart)}" if apart else "")
