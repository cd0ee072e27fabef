"""The charts of a record's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from benchmarks.suite.report.tables import Point, median_of
from serving.support.svg_charts import SMALL, Axis, Points, chart

Names = Mapping[str, int]
_LATENCIES = {"ttft": "Time to first token", "inter_token": "Inter-token latency"}


def latency_throughput(record: Mapping[str, Any], names: Names) -> str:
    """A curve a target: latency over the rates of a sweep, and over the throughput of numbers of clients."""
    drawn = []
    for scenario, across, label in (
        # Over what was offered: past saturation what is achieved falls again, and curves over it cross themselves.
        ("saturation", "Rising rates", "requests a second offered"),
        ("concurrency", "Clients", "tokens a second"),
    ):
        points = [
            point for point in record["points"] if point["scenario"] == scenario and "p50_e2e_ms" in point["winners"]
        ]
        if len(points) < 2:
            continue
        if scenario == "concurrency":
            across += " " + ", ".join(str(point["concurrency"]) for point in points)
        for figure, latency in (("p50_e2e_ms", "end to end, p50"), ("p99_ttft_ms", "first token, p99")):
            curves: dict[str, Points] = {}
            for name in names:
                rows = [row for point in points for row in point["rows"] if row["target"] == name]
                pairs = [(_load(row), median_of(row, figure)) for row in rows]
                curves[name] = [(x, y) for x, y in pairs if x is not None and y is not None]
            axes = Axis(label, is_log=True), Axis(is_log=True)
            drawn.append(_figure(f"{across}: {latency}, ms", curves, names, *axes, dots=True))
    return pair(drawn)


def _load(row: Mapping[str, Any]) -> float | None:
    return float(row["pace"]["offered"]) if "pace" in row else median_of(row, "output_tokens_per_second")


def steps_chart(points: Sequence[Point], figure: str, names: Names) -> str:
    """A figure of static batches over their size, a curve a target; nothing for one size."""
    curves: dict[str, Points] = {name: [] for name in names}
    for point in points:
        for row in point["rows"]:
            if (value := median_of(row, figure)) is not None:
                curves[row["target"]] = [*curves[row["target"]], (float(point["settings"]["requests"]), value)]
    if len(points) < 2:
        return ""
    title = {"step_ms": "Decode step of all rows, ms", "step_tokens_per_second": "Tokens a second"}[figure]
    axes = Axis("rows", is_log=True), Axis(is_log=True)
    return _figure(title, {name: curve for name, curve in curves.items() if curve}, names, *axes, dots=True)


def cdf(point: Point, latency: str, names: Names) -> str:
    """How many of a latency's values came within how long."""
    curves: dict[str, Points] = {}
    for row in point["rows"]:
        # A record that is kept for its figures may have no curves.
        if values := (row["curves_ms"] or {}).get(latency):
            curves[row["target"]] = [(value, float(percent)) for percent, value in enumerate(values)]
    return _figure(
        f"{_LATENCIES[latency]}: percent that came within", curves, names, Axis("ms", is_log=True), Axis(from_zero=True)
    )


def _figure(title: str, curves: Mapping[str, Points], names: Names, x: Axis, y: Axis, **how: Any) -> str:
    drawn = chart(title, curves, x, y, places=names, size=SMALL, **how)
    return f"<figure><figcaption>{escape(title)}</figcaption>{drawn}</figure>" if drawn else ""


def pair(drawn: Sequence[str]) -> str:
    """Figures side by side where there is room."""
    return f'<div class="pair">{"".join(drawn)}</div>' if any(drawn) else ""
