"""Charts for a page, as SVG: curves and points over linear or logarithmic axes, and bars over time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from serving.support.html_page import COLOURS, colour

Points = Sequence[tuple[float, float]]
WIDE = (640, 220)
SMALL = (440, 280)
_DASHES = ("", "7 3", "2 3", "9 3 2 3")
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 12, 36


@dataclass(frozen=True)
class Axis:
    """What an axis shows; `label` stands at its end. A logarithmic one shows values above 0 only.

    It ends at round values around all that is shown, a tight one at the least and greatest.
    """

    label: str = ""
    is_log: bool = False
    from_zero: bool = False
    is_tight: bool = False


@dataclass(frozen=True)
class _Scale:
    """Values to shares of an axis' length, with its marks."""

    marks: list[float]
    low: float
    high: float
    is_log: bool

    def share(self, value: float) -> float:
        if self.is_log:
            value = math.log10(value)
        return (value - self.low) / (self.high - self.low)


def chart(
    title: str,
    curves: Mapping[str, Points],
    x: Axis | None = None,
    y: Axis | None = None,
    *,
    places: Mapping[str, int] | None = None,
    size: tuple[int, int] = WIDE,
    dots: bool = False,
    lines: bool = True,
    guides: Sequence[Points] = (),
    within: Points = (),
) -> str:
    """Return the curves over common axes, or nothing if they hold no point.

    Args:
        title: for those who do not see it; not drawn.
        places: each curve's place among all series, which decides on its colour and dashes; its own order by default.
        dots: draw the points. A curve of one point is always one.
        lines: draw what is between them.
        guides: background lines, cut off where the axes end.
        within: points that the axes hold as well, though nothing is drawn there.
    """
    x, y = x or Axis(), y or Axis()
    shown = {name: [p for p in curve if (p[0] > 0 or not x.is_log) and (p[1] > 0 or not y.is_log)]
             for name, curve in curves.items()}  # fmt: skip
    points = [point for curve in shown.values() for point in curve]
    if not points:
        return ""
    held = [*points, *within]
    across, up = _scale(x, [point[0] for point in held]), _scale(y, [point[1] for point in held])
    right, bottom = size[0] - _RIGHT, size[1] - _BOTTOM

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return _LEFT + across.share(point[0]) * (right - _LEFT), bottom - up.share(point[1]) * (bottom - _TOP)

    drawn = []
    for mark in up.marks:
        height = bottom - up.share(mark) * (bottom - _TOP)
        drawn.append(f'<path class="axis" d="M{_LEFT} {height:.1f}H{right}"/>')
        drawn.append(f'<text x="{_LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{number(mark)}</text>')
    drawn += _across_marks(across, right, bottom)
    for guide in guides:
        drawn.append(_clipped(_polyline([place(point) for point in guide], "var(--soft)", "4 3"), right, bottom))
    for order, (name, curve) in enumerate(shown.items()):
        drawn.append(_curve([place(point) for point in curve], (places or {}).get(name, order), dots, lines))
    labels = f'<text x="{right}" y="{size[1] - 3}" text-anchor="end">{escape(x.label)}</text>'
    return (
        f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{escape(title)}">{"".join(drawn)}{labels}</svg>'
    )


def legend(names: Sequence[str]) -> str:
    """Return the names with their lines, in the order of their places."""
    marks = (
        f'<b style="color: {colour(place)}"><svg viewBox="0 0 26 10">'
        f"{_polyline([(0, 5), (26, 5)], colour(place), _dash(place))}</svg>{escape(name)}</b>"
        for place, name in enumerate(names)
    )
    return f'<p class="legend">{" ".join(marks)}</p>'


def bars(title: str, rows: Sequence[Sequence[tuple[float, float, str]]], label: str, most: float | None = None) -> str:
    """Return rows of (start, end, colour) over one axis from 0, to `most` or their last end, the first on top."""
    ends = [end for row in rows for _, end, _ in row]
    if not ends:
        return ""
    across = _Scale(_within(ticks(0.0, most or max(ends)), 0.0, most or max(ends)), 0.0, most or max(ends), False)
    step = 7
    width, left, right = SMALL[0], 8, SMALL[0] - _RIGHT
    bottom = _TOP + step * len(rows)
    drawn = _across_marks(across, right, bottom, left)
    for place, row in enumerate(rows):
        for start, end, fill in row:
            first, last = (left + across.share(value) * (right - left) for value in (start, end))
            height = _TOP + step * place
            drawn.append(
                f'<rect x="{first:.1f}" y="{height}" width="{max(last - first, 0.3):.1f}" height="{step - 2}" '
                f'fill="{fill}"/>'
            )
    drawn.append(f'<text x="{right}" y="{bottom + 32}" text-anchor="end">{escape(label)}</text>')
    box = f'viewBox="0 0 {width} {bottom + _BOTTOM}"'
    return f'<svg {box} role="img" aria-label="{escape(title)}">{"".join(drawn)}</svg>'


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


def log_ticks(low: float, high: float) -> tuple[list[float], float, float]:
    """Return marks for values from `low` > 0 to `high`, and the ends of an axis around them.

    The ends are 1, 2 or 5 times a power of ten, as are the marks between them where two powers reach; else the
    marks are powers alone, or every second or third and so on, for eight at most.
    """
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9) + 1
    every = [float(f"{factor * 10.0**power:.12g}") for power in range(first, last + 1) for factor in (1, 2, 5)]
    start = max(mark for mark in every if mark <= low * (1 + 1e-9))
    stop = min(mark for mark in every if mark >= high * (1 - 1e-9) and mark > start)
    if stop / start <= 100:
        return [mark for mark in every if start <= mark <= stop], start, stop
    step = math.ceil((last - first) / 8)
    powers = [float(f"{10.0**power:.12g}") for power in range(first, last + 1, step)]
    return _within(powers, start, stop), start, stop


def number(value: float) -> str:
    """A mark of an axis: thousands apart, and large or small ones by their unit or power."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= limit:
            return f"{value / limit:,.6g} {unit}"
    return f"{value:,.10g}" if value == 0 or abs(value) >= 1e-4 else f"{value:.3g}"


def _scale(axis: Axis, values: Sequence[float]) -> _Scale:
    low, high = min(values), max(values)
    if axis.is_log:
        marks, start, stop = log_ticks(low, high)
        return _Scale(marks, math.log10(start), math.log10(stop), True)
    if axis.is_tight and high > low:
        return _Scale(_within(ticks(low, high), low, high), low, high, False)
    marks = ticks(0.0 if axis.from_zero else low, high if high > 0 or not axis.from_zero else 1.0)
    return _Scale(marks, marks[0], marks[-1], False)


def _across_marks(scale: _Scale, right: float, bottom: float, left: float = _LEFT) -> list[str]:
    drawn = [f'<path class="axis" d="M{left} {bottom}H{right}"/>']
    for mark in scale.marks:
        at = left + scale.share(mark) * (right - left)
        anchor = "start" if at < left + 8 else "end" if at > right - 8 else "middle"
        drawn.append(f'<path class="axis" d="M{at:.1f} {bottom}V{bottom + 4}"/>')
        drawn.append(f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="{anchor}">{number(mark)}</text>')
    return drawn


def _curve(places: Sequence[tuple[float, float]], place: int, dots: bool, lines: bool) -> str:
    drawn = _polyline(places, colour(place), _dash(place)) if lines and len(places) > 1 else ""
    if dots or len(places) == 1:
        hollow = "var(--paper)" if place >= COLOURS else colour(place)
        drawn += "".join(
            f'<circle fill="{hollow}" stroke="{colour(place)}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in places
        )
    return drawn


def _polyline(places: Sequence[tuple[float, float]], stroke: str, dash: str = "") -> str:
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline class="curve" stroke="{stroke}"{dashed} points="{line}"/>'


def _clipped(drawn: str, right: float, bottom: float) -> str:
    """What lies outside the axes is not shown: an inner picture ends at its edges."""
    width, height = right - _LEFT, bottom - _TOP
    box = f'x="{_LEFT}" y="{_TOP}" width="{width}" height="{height}" viewBox="{_LEFT} {_TOP} {width} {height}"'
    return f'<svg {box} style="width: {width}px; height: {height}px">{drawn}</svg>'


def _dash(place: int) -> str:
    return _DASHES[place // COLOURS % len(_DASHES)]


def _within(marks: Sequence[float], low: float, high: float) -> list[float]:
    return [mark for mark in marks if low <= mark <= high]
