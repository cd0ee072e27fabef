"""Charts: where points come to lie, what marks axes have, and what is left out."""

from __future__ import annotations

import re

import pytest

from serving.support.svg_charts import SMALL, Axis, bars, chart, legend, log_ticks, number


def places(drawn: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawn)]


@pytest.mark.parametrize(
    ("low", "high", "expected", "start", "stop"),
    [
        (3, 80, [2, 5, 10, 20, 50, 100], 2, 100),
        (1, 1, [1, 2], 1, 2),
        (0.03, 4, [0.1, 1], 0.02, 5),
        (5, 50, [5, 10, 20, 50], 5, 50),
        (900, 15_000, [500, 1000, 2000, 5000, 10_000, 20_000], 500, 20_000),
        (7, 2e9, [1e2, 1e4, 1e6, 1e8], 5, 2e9),
    ],
)
def test_a_logarithmic_axis_has_round_marks_within_round_ends(
    low: float, high: float, expected: list[float], start: float, stop: float
) -> None:
    assert log_ticks(low, high) == (pytest.approx(expected), start, stop)


@pytest.mark.parametrize("exponent", range(1, 300, 7))
def test_a_logarithmic_axis_has_two_to_nine_marks(exponent: int) -> None:
    for low in (1e-150, 3e-150, 9.99e-150):
        marks, start, stop = log_ticks(low, low * 10.0**exponent)
        assert start <= low * (1 + 1e-9) and stop >= low * 10.0**exponent * (1 - 1e-9)
        assert 2 <= len(marks) <= 9


def test_equal_ratios_are_equally_far_apart_on_a_logarithmic_axis() -> None:
    drawn = chart("t", {"a": [(1, 0), (10, 50), (100, 100), (0, 9)]}, Axis(is_log=True), size=SMALL, dots=True)
    first, second, third = places(drawn)
    assert second[0] - first[0] == pytest.approx(third[0] - second[0])
    assert (first[0], third[0]) == (58, SMALL[0] - 12) and (first[1], third[1]) == (SMALL[1] - 36, 12)


def test_guides_do_not_widen_the_axes_and_what_must_be_within_does() -> None:
    curves = {"a": [(1.0, 1.0), (10.0, 10.0)]}
    axes = Axis(is_log=True), Axis(is_log=True)
    alone = places(chart("t", curves, *axes, dots=True))
    assert places(chart("t", curves, *axes, dots=True, guides=[[(0.001, 0.001), (1000, 1000)]])) == alone
    wider = places(chart("t", curves, *axes, dots=True, within=[(100.0, 100.0)]))
    assert wider[0] == alone[0] and wider[1][0] < alone[1][0] and wider[1][1] > alone[1][1]


def test_a_seventh_series_is_told_apart_by_its_dashes() -> None:
    names = [f"n{place}" for place in range(8)]
    drawn = chart("t", {name: [(0, place), (1, place)] for place, name in enumerate(names)})
    strokes = re.findall(r'<polyline class="curve" (stroke=[^p]*)points', drawn)
    assert len(set(strokes)) == len(names)
    assert re.findall(r'<polyline class="curve" (stroke=[^p]*)points', legend(names)) == strokes
    # One of several keeps its place.
    assert strokes[7] in chart("t", {"n7": [(0, 1), (1, 2)]}, places={"n7": 7})


def test_what_has_no_point_is_not_drawn() -> None:
    assert chart("t", {"a": []}) == chart("t", {"a": [(0, 1)]}, Axis(is_log=True)) == bars("t", [[]], "ms") == ""
    assert chart("<t>", {"a": [(3, 1)]}).count("<circle") == 1 and "&lt;t&gt;" in chart("<t>", {"a": [(3, 1)]})


def test_bars_begin_and_end_where_they_say() -> None:
    drawn = bars("t", [[(0, 50, "red"), (50, 100, "blue")], [(25, 75, "red")]], "ms", 200)
    found = re.findall(r'<rect x="([\d.]+)" y="(\d+)" width="([\d.]+)"', drawn)
    width = SMALL[0] - 12 - 8
    expected = [(8, 12, width / 4), (8 + width / 4, 12, width / 4), (8 + width / 8, 19, width / 4)]
    assert [tuple(map(float, each)) for each in found] == [pytest.approx(each, abs=0.06) for each in expected]


def test_numbers_of_axes_are_short() -> None:
    values = (0, 0.25, 12_500, 2.5e6, 3e9, 0.00002)
    assert [number(value) for value in values] == ["0", "0.25", "12,500", "2.5 M", "3 G", "2e-05"]
