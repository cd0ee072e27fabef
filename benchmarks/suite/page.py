"""A record as one HTML page: no scripts, nothing from outside, light and dark, readable on a phone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from benchmarks.suite.measure import JUDGED
from benchmarks.suite.tables import agreement, median_of, name_of, notes

_HEADS = ("first token p50", "inter-token p50", "inter-token p99", "end to end p50", "tokens/s")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 280, 58, 12, 12, 40
_COLOURS = 6
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --faint: #d5dae0; --win: #e3f3e6; --c0: #0b62c4;
  --c1: #c2410c; --c2: #15803d; --c3: #9333ea; --c4: #b3005e; --c5: #6b7280; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --paper: #14171b; --faint: #3a414b; --win: #173a20;
  --c0: #6cb0ff; --c1: #ff9e64; --c2: #6ee7a0; --c3: #c9a2ff; --c4: #ff8ac4; --c5: #a8b0bc; } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 12px; }
.axis { stroke: var(--faint); fill: none; } .curve { fill: none; stroke-width: 1.8; }
.legend b { margin-right: 1rem; font-weight: 600; white-space: nowrap; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; margin: .5rem 0 1rem; }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid var(--faint); white-space: nowrap;
  font-variant-numeric: tabular-nums; } th:first-child, td:first-child { text-align: left; }
td.win { background: var(--win); font-weight: 600; } .note { font-size: 13px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1rem; }
"""
Points = Sequence[tuple[float, float]]


def to_page(record: Mapping[str, Any]) -> bytes:
    """The whole page, UTF-8."""
    title = f"{record['bundle']}: what a client sees"
    machine = record["environment"]
    names = [target["name"] for target in record["targets"]]
    body = [
        f"<p>{escape(machine['cpu'])}, {machine['cores']} cores, {machine['date'][:10]}; "
        f"{record['settings']['repeats']} repeats, targets taking turns. Latencies are in ms and begin at the "
        "scheduled moment. A shaded figure is better than every other beyond the noise; where none is "
        "shaded, nothing is.</p>",
        _legend([name_of({"target": each["name"], "stand_in": each["stand_in"]}) for each in record["targets"]]),
        _curves_section(record, names),
    ]
    for point in record["points"]:
        body.append(f"<h2>{escape(point['scenario'])}: {escape(point['point'])}</h2>")
        body.append(_table(point))
        charts = "".join(_cdf(point, latency, names) for latency in ("ttft", "inter_token"))
        body.append(f'<div class="pair">{charts}</div>')
    body.append(_targets(record))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    ).encode("utf-8", "replace")


def _legend(names: Sequence[str]) -> str:
    marks = " ".join(f'<b style="color: {_colour(place)}">{escape(name)}</b>' for place, name in enumerate(names))
    return f'<p class="legend">{marks}</p>'


def _colour(place: int) -> str:
    return f"var(--c{place % _COLOURS})"


def _table(point: Mapping[str, Any]) -> str:
    lines = [
        "<tr><th>target</th>" + "".join(f"<th>{head}</th>" for head in _HEADS) + "<th>floor</th><th>/ floor</th></tr>"
    ]
    remarks = [f'<p class="note">{escape(agreement(point))}</p>']
    for row in point["rows"]:
        cells = []
        for figure in JUDGED:
            won = ' class="win"' if point["winners"][figure] == row["target"] else ""
            cells.append(f"<td{won}>{_number(median_of(row, figure))}</td>")
        floor, step = row["floor_inter_token_ms"], median_of(row, "p50_inter_token_ms")
        over = step / floor if floor and step else None
        cells += [f"<td>{_number(floor)}</td>", f"<td>{_number(over)}</td>"]
        lines.append(f"<tr><td>{escape(name_of(row))}</td>{''.join(cells)}</tr>")
        remarks += [f'<p class="note">{escape(name_of(row))}: {escape(note)}</p>' for note in notes(row)]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>{"".join(remarks)}'


def _targets(record: Mapping[str, Any]) -> str:
    lines = ["<tr><th>target</th><th>what it is</th><th>weights</th><th>load, s</th><th>warm after</th></tr>"]
    for target in record["targets"]:
        warm = f"{target['warm_after']} requests" if target["warm"] else "never steady"
        label = target["label"] + (" (stand-in)" if target["stand_in"] else "")
        cells = (target["name"], label, target["precision"] or "not known", _number(target["load_seconds"]), warm)
        lines.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    missing = "".join(
        f'<p class="note">{escape(name)} was not measured: {escape(why)}</p>'
        for name, why in record.get("not_measured", {}).items()
    )
    speed = record["read_bandwidth_bytes_per_second"]
    floor = (
        f"<p>The floor is the time to read all weights and one row's cache once, at {speed / 1e9:.1f} GB/s, measured "
        "between the repeats. A step that serves several rows reads more cache. It is not a bound where the weights "
        "fit the last-level cache.</p>"
        if speed
        else ""
    )
    return f'<h2>Targets</h2><div class="wide"><table>{"".join(lines)}</table></div>{missing}{floor}'


def _curves_section(record: Mapping[str, Any], names: Sequence[str]) -> str:
    """Throughput against latency, a curve a target over the concurrency sweep; nothing without a sweep."""
    points = [point for point in record["points"] if point["scenario"] == "concurrency"]
    if len(points) < 2:
        return ""
    curves: dict[str, Points] = {}
    for name in names:
        rows = [row for point in points for row in point["rows"] if row["target"] == name]
        pairs = [(median_of(row, "p50_e2e_ms"), median_of(row, "output_tokens_per_second")) for row in rows]
        curves[name] = [(x, y) for x, y in pairs if x is not None and y is not None]
    clients = ", ".join(str(point["concurrency"]) for point in points)
    caption = f"tokens a second over end-to-end latency (p50, ms), at {clients} clients"
    return f"<h2>Latency and throughput</h2>{_chart(caption, curves, names, dots=True)}"


def _cdf(point: Mapping[str, Any], latency: str, names: Sequence[str]) -> str:
    curves: dict[str, Points] = {}
    for row in point["rows"]:
        values = row["curves_ms"][latency]
        if values:
            curves[row["target"]] = [(value, float(percent)) for percent, value in enumerate(values)]
    named = {"ttft": "time to first token", "inter_token": "inter-token latency"}[latency]
    return f"<div>{_chart(f'{named}, ms: percent that came within', curves, names)}</div>" if curves else ""


def _chart(title: str, curves: Mapping[str, Points], names: Sequence[str], dots: bool = False) -> str:
    """Curves over a logarithmic horizontal axis."""
    points = [point for curve in curves.values() for point in curve if point[0] > 0]
    if not points:
        return ""
    low, high = math.log10(min(x for x, _ in points)), math.log10(max(x for x, _ in points))
    low, high = (low - 0.05, high + 0.05) if high - low < 0.1 else (low, high)
    top = max(y for _, y in points) or 1.0
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x = _LEFT + (math.log10(max(point[0], 10**low)) - low) / (high - low) * (right - _LEFT)
        return x, bottom - point[1] / top * (bottom - _TOP)

    drawn = []
    for quarter in range(5):
        y = bottom - quarter / 4 * (bottom - _TOP)
        drawn.append(f'<path class="axis" d="M{_LEFT} {y:.1f}H{right}"/>')
        drawn.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(top * quarter / 4)}</text>')
    for step in range(4):
        value = 10 ** (low + (high - low) * step / 3)
        x, _ = place((value, 0))
        anchor = "start" if step == 0 else "end" if step == 3 else "middle"
        drawn.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="{anchor}">{_number(value)}</text>')
    for name, curve in curves.items():
        colour = _colour(names.index(name))
        places = [place(point) for point in curve]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        drawn.append(f'<polyline class="curve" stroke="{colour}" points="{line}"/>')
        if dots:
            drawn += [f'<circle fill="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in places]
    text = f'<text x="{_LEFT}" y="{_HEIGHT - 4}">{escape(title)}</text>'
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(drawn)}{text}</svg>'


def _number(value: float | None) -> str:
    """Three digits that count, or "none"."""
    if value is None:
        return "none"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
