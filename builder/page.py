"""One HTML page without scripts or outside references, light and dark, readable on a phone; and charts for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 220, 64, 10, 10, 28
_COLOURS = ("var(--first)", "var(--second)")
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --faint: #d5dae0; --first: #0b62c4;
  --second: #c2410c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ee; --paper: #14171b; --faint: #3a414b; --first: #6cb0ff; --second: #ff9e64; } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; max-width: 48rem;
  margin: 2rem auto; padding: 0 1rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 11px; }
.axis { stroke: var(--faint); fill: none; } .curve { fill: none; stroke-width: 1.6; }
.legend b { margin-right: 1rem; font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; width: 100%; }
th, td { text-align: left; padding: 0.2rem 0.6rem; border-bottom: 1px solid var(--faint); }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td.bar { width: 50%; } td.bar span { display: block; height: 0.8rem; background: var(--first); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: 1rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--faint); padding: 0.5rem;
  margin: 0 0 1rem; }
pre b { color: var(--first); }
"""


def page(title: str, body: str) -> bytes:
    """Return a whole page, UTF-8, under its title; half a character, which UTF-8 has not, becomes `?`."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    ).encode("utf-8", "replace")


def section(title: str, content: str) -> str:
    """Return a heading and its content, or nothing where there is no content."""
    return f"<h2>{escape(title)}</h2>\n{content}\n" if content else ""


def chart(title: str, curves: dict[str, Points]) -> str:
    """Return curves of (step, value), two at most, over common axes, as an SVG; with a legend if there are two."""
    points = [point for curve in curves.values() for point in curve]
    first, last = min(step for step, _ in points), max(step for step, _ in points)
    marks = ticks(min(value for _, value in points), max(value for _, value in points))
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    per_step = (right - _LEFT) / (last - first or 1)
    per_value = (bottom - _TOP) / (marks[-1] - marks[0])

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return _LEFT + (point[0] - first) * per_step, bottom - (point[1] - marks[0]) * per_value

    drawn = []
    for mark in marks:
        _, y = place((first, mark))
        drawn.append(f'<path class="axis" d="M{_LEFT} {y:.1f}H{right}"/>')
        drawn.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{mark:,.10g}</text>')
    for colour, curve in zip(_COLOURS, curves.values(), strict=False):
        places = [place(point) for point in curve]
        if len(places) == 1:
            drawn.append(f'<circle fill="{colour}" cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3"/>')
        else:
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            drawn.append(f'<polyline class="curve" stroke="{colour}" points="{line}"/>')
    legend = "".join(
        f'<b style="color: {colour}">{escape(name)}</b>' for colour, name in zip(_COLOURS, curves, strict=False)
    )
    return (
        (f'<p class="legend">{legend}</p>\n' if len(curves) > 1 else "")
        + f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(drawn)}'
        + f'<text x="{_LEFT}" y="{_HEIGHT - 8}">step {first:,.0f}</text>'
        + f'<text x="{right}" y="{_HEIGHT - 8}" text-anchor="end">{last:,.0f}</text></svg>'
    )


def ticks(low: float, high: float) -> list[float]:
    """Return 2 to 6 round values, equally far apart, from at or below `low` to at or above `high`.

    Steps are 1, 2 or 5 times a power of ten.
    """
    if high <= low:
        spread = abs(low) / 2 or 1.0
        low, high = low - spread, high + spread
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    start, stop = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.12g}") for number in range(start, stop + 1)]
