"""The charts of a record's page."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from benchmarks.suite.report.tables import Point, median_of, name_of
from serving.support.svg_charts import SMALL, Axis, Points, bars, chart

Names = Mapping[str, int]
_LATENCIES = {"ttft": "Time to first token", "inter_token": "Inter-token latency"}
# A request in a timeline: it waits, its prompt is read, its tokens come.
_PHASES = (("waits", "var(--faint)"), ("reads the prompt", "var(--c1)"), ("makes tokens", "var(--c0)"))


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


def timelines(point: Point) -> str:
    """The first repeat's requests as bars, a chart for each target, folded away."""
    rows = [row for row in point["rows"] if row["timeline_ms"]]
    if not rows or point["concurrency"] == 1:
        return ""
    last = max(bar[4] for row in rows for bar in row["timeline_ms"])
    drawn = []
    for row in rows:
        lines = [_bar(*bar) for bar in row["timeline_ms"]]
        caption = f"<figcaption>{escape(name_of(row))}</figcaption>"
        drawn.append(f"<figure>{caption}{bars(f'requests of {name_of(row)}', lines, 'ms', last)}</figure>")
    marks = " ".join(f'<b style="color: {fill}">&#9632;</b> {phase}' for phase, fill in _PHASES)
    note = f'<p class="note">{marks}; where the start of work is not told, waiting is in the reading.</p>'
    return f"<details><summary>Timeline of the first repeat</summary>{note}{pair(drawn)}</details>"


def _bar(
    scheduled: float, sent: float, started: float | None, first: float, finished: float
) -> list[tuple[float, float, str]]:
    began = sent if started is None else started
    ends = itertools.pairwise((scheduled, began, first, finished))
    return [(*pair, fill) for pair, (_, fill) in zip(ends, _PHASES, strict=True) if pair[1] > pair[0]]


def roofline(record: Mapping[str, Any], names: Names) -> str:
    """Attained FLOP/s over FLOPs a byte, prefill and decode apart, under what memory and arithmetic allow."""
    bandwidth, rate = record["read_bandwidth_bytes_per_second"], record["fp32_flops_per_second"]
    rows = [row for point in record["points"] for row in point["rows"] if row["roofline"]]
    if not rows or not bandwidth or not rate:
        return ""
    drawn = []
    for phase in ("prefill", "decode"):
        curves: dict[str, Points] = {name: [] for name in names}
        for row in rows:
            if found := row["roofline"][phase]:
                curves[row["target"]] = [*curves[row["target"]], (found["intensity"], found["flops_per_second"] / 1e9)]
        axes = Axis("FLOPs a byte", is_log=True), Axis(is_log=True)
        # The ridge, and the two lines that meet there, from far left to far right.
        ridge = rate / bandwidth
        roof = [(ridge * 1e-6, rate * 1e-6 / 1e9), (ridge, rate / 1e9), (ridge * 1e6, rate / 1e9)]
        title = f"{phase.capitalize()}: GFLOP/s attained"
        drawn.append(
            _figure(title, curves, names, *axes, dots=True, lines=False, guides=[roof], within=[(ridge, rate / 1e9)])
        )
    note = (
        f"A point for each scenario. Dashed: {bandwidth / 1e9:.1f} GB/s read from memory and {rate / 1e9:.0f} GFLOP/s "
        "of float32 products, the best measured in this run. Work and bytes are the least that the model needs, "
        "weights read once for all requests that are in the phase together. Weights that fit the caches may lie above "
        "the slope, and products of fewer bits above the level."
    )
    return f'<p class="note">{note}</p>{pair(drawn)}'


def _figure(title: str, curves: Mapping[str, Points], names: Names, x: Axis, y: Axis, **how: Any) -> str:
    drawn = chart(title, curves, x, y, places=names, size=SMALL, **how)
    return f"<figure><figcaption>{escape(title)}</figcaption>{drawn}</figure>" if drawn else ""


def pair(drawn: Sequence[str]) -> str:
    """Figures side by side where there is room."""
    return f'<div class="pair">{"".join(drawn)}</div>' if any(drawn) else ""
