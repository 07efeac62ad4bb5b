"""Where a chart's lines and ticks lie."""

import json
import math

import pytest

from coati.trainer.run_report.curves import (
    MOST_POINTS,
    Curve,
    chart,
    running_mean,
    short,
    thinned,
    tick_labels,
    ticks,
)
from coati.trainer.run_report.run_files import Series


def series(*points):
    made = Series()
    for step, value in points:
        made.add(step, value)
    return made


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0, 1, ["0.0", "0.5", "1.0"]),
        (0.13, 0.19, ["0.14", "0.16", "0.18"]),
        (-3, 12, ["0", "5", "10"]),
        (0, 4321, ["0", "2,000", "4,000"]),
        (0, 2e-5, ["0", "1e-05", "2e-05"]),
    ],
)
def test_ticks_are_round_and_labels_tell_them_apart(low, high, expected):
    assert tick_labels(ticks(low, high, 3)) == expected


@pytest.mark.parametrize(
    "value, text",
    [(1.23456, "1.235"), (12345.6, "12,346"), (2e-5, "2e-05"), (0.0, "0"), (math.nan, "nan")],
)
def test_numbers_are_short(value, text):
    assert short(value) == text


def test_a_line_goes_from_corner_to_corner():
    """Two labels "0.0", "0.5": left is 14 + 3 x 6.6; values 0 and 1 of a share are 180 and 12."""
    drawn = chart("Accuracy", [Curve("a", series((0, 0.0), (10, 1.0)))], share=True)
    assert drawn.left == pytest.approx(14 + 6.6 * len(drawn.yticks[0][1]), abs=0.1)
    assert drawn.lines[0].path == f"M{drawn.left:g} 180L386 12"
    assert drawn.xticks[0] == (drawn.left, "0") and drawn.xticks[-1] == (386.0, "10")


def test_lines_are_told_apart_without_color():
    drawn = chart("x", [Curve(str(n), series((0, n), (1, n + 1))) for n in range(20)])
    assert len({(line.style, line.dash) for line in drawn.lines}) == 20
    assert len({line.dash for line in drawn.lines[:8]}) == 8


def test_a_value_that_is_no_number_interrupts_the_line_and_is_said():
    drawn = chart("x", [Curve("loss", series((0, 1), (1, 2), (2, math.nan), (3, 1), (4, 2)))])
    assert [part.count("L") for part in drawn.lines[0].path.split("M")[1:]] == [1, 1]
    assert drawn.remarks == ["loss: 1 of 5 values are not finite"]


@pytest.mark.parametrize("values", [[], [(5, 1.0)], [(5, math.nan)], [(5, 0.0), (6, 0.0)]])
def test_little_or_nothing_is_drawn_without_fail(values):
    drawn = chart("x", [Curve("loss", series(*values))])
    assert "nan" not in drawn.lines[0].path
    assert len(drawn.lines[0].marks) == len([v for _, v in values if v == v])
    assert drawn.yticks


def test_no_spike_is_lost_among_many_points():
    points = [(float(step), math.sin(step)) for step in range(10_000)]
    points[1234] = (1234.0, 99.0)
    points[7777] = (7777.0, -99.0)
    thin = thinned(points)
    assert len(thin) <= MOST_POINTS + 2
    assert {99.0, -99.0} <= {value for _, value in thin}
    assert thin[0] == points[0] and thin[-1] == points[-1]
    assert [x for x, _ in thin] == sorted(x for x, _ in thin)


def test_the_running_mean_of_a_line_is_the_line():
    points = [(float(step), 2.0 * step) for step in range(100)]
    mean = running_mean(points)
    assert mean[50] == (50.0, 100.0)
    assert mean[0][1] == pytest.approx((0 + 2 + 4) / 3)


def test_values_of_many_sizes_get_a_logarithmic_axis():
    drawn = chart("x", [Curve("p", series((0, 50_000), *((n, 20.0) for n in range(1, 9))))])
    assert drawn.unit == " (log scale)"
    assert [text for _, text in drawn.yticks] == ["100", "1,000", "10,000"]
    assert chart("x", [Curve("p", series((0, 50), (1, 20), (2, 10)))]).unit == ""


def test_bounds_are_drawn_and_inside():
    low = series((0, 0.4), (1, 0.6))
    high = series((0, 0.6), (1, 0.9))
    drawn = chart("x", [Curve("a", series((0, 0.5), (1, 0.7)), True, low, high)], share=True)
    assert [len(drawn.lines[0].bounds), drawn.lines[0].bounds[0][1:]] == [2, (112.8, 79.2)]


def test_the_pointer_is_told_steps_and_values():
    drawn = chart("x", [Curve("loss", series((3, 0.123456), (4, 2.0)))])
    assert json.loads(drawn.data)["lines"] == [{"name": "loss", "at": [[3, "0.1235"], [4, "2"]]}]
    assert drawn.label == "x by step: loss 0.1235 at step 3, 2 at 4"
