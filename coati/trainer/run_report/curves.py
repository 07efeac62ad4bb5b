"""Line charts as numbers for a template: where the lines, ticks and marks of one chart lie.

The markup is in curves.html.jinja. matplotlib draws the data report's one histogram, but a page of
this kind has a dozen charts and is written again at each evaluation: there its import alone takes
1.5 s on two cores and twelve charts 0.5 s, these 0.02 s; and its lines have no values to point at.
"""

import json
import math
import sys
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from coati.trainer.run_report.run_files import Series

WIDTH = 400  # of the view box: one unit is a CSS pixel on a desktop, nine tenths on a phone
HEIGHT = 220
TOP = 12
BOTTOM = 40
RIGHT = 14
LETTER = 6.6  # width of a digit of 12 units
MOST_POINTS = 240  # of a drawn line; of more, the lowest and highest of each stretch
SMOOTH_FROM = 80  # points from which a running mean is drawn over the values
STYLES = 8  # colors; the dash pattern changes too
FEW = 40  # points up to which each is marked
WIDE_RANGE = 200  # highest over median value from which the axis is logarithmic


@dataclass(frozen=True)
class Curve:
    """A named series of a chart. ``low``, ``high``: the bounds of its values, where it has any;
    ``marked``: each value is one measurement, and is shown as such; ``noisy``: of many values a
    running mean is drawn too."""

    name: str
    series: Series
    marked: bool = False
    low: Series | None = None
    high: Series | None = None
    noisy: bool = True

    def smoothed(self, count: int) -> bool:
        """Whether of ``count`` values a running mean is drawn."""
        return self.noisy and not self.marked and count >= SMOOTH_FROM


@dataclass
class DrawnLine:
    """A line in units of the view box: an SVG path, a smoother one, and places of marks and
    bounds."""

    name: str
    style: int
    dash: int
    path: str
    smooth: str = ""
    marks: list[tuple[float, float]] = field(default_factory=list)
    bounds: list[tuple[float, float, float]] = field(default_factory=list)


@dataclass
class Chart:
    """What curves.html.jinja draws. ``data``: JSON for the values that are shown at a pointer."""

    title: str
    unit: str
    xlabel: str
    left: float
    xticks: list[tuple[float, str]]
    yticks: list[tuple[float, str]]
    lines: list[DrawnLine]
    resumed: list[float]
    remarks: list[str]
    data: str
    label: str
    named: bool  # the lines need their names even where there is one


class _Scale:
    """From values to places between ``start`` and ``end``."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False):
        self.low = low
        self.high = high
        self.start = start
        self.end = end
        self.log = log

    def __call__(self, value: float) -> float:
        low, high, value = (
            (math.log10(x) if self.log else x) for x in (self.low, self.high, value)
        )
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)


def short(value: float) -> str:
    """Four significant digits, thousands separated."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1e7 or 0 < abs(value) < 1e-4:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most ``most`` + 1 round numbers in [low, high]: multiples of 1, 2 or 5 times a power of
    ten."""
    raw = high / most - low / most
    if not sys.float_info.min < raw < sys.float_info.max:
        return [low, high]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(nice * power for nice in (1, 2, 5, 10) if nice * power >= raw * 0.999999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """As few digits as tell ``values`` apart."""
    largest = max((abs(value) for value in values), default=0.0)
    if largest >= 1e6 or 0 < largest < 1e-3:
        return [f"{value:.3g}" if value else "0" for value in values]
    step = min((b - a for a, b in zip(values, values[1:], strict=False)), default=largest or 1.0)
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0
    return [f"{value:,.{digits}f}" for value in values]


def chart(
    title: str,
    curves: Sequence[Curve],
    *,
    xlabel: str = "step",
    unit: str = "",
    share: bool = False,
    resumed: Sequence[float] = (),
    styles: Sequence[int] | None = None,
) -> Chart:
    """One chart of ``curves``. ``share``: the axis goes from 0 to 1; ``resumed``: the steps at
    which the run was resumed; ``styles``: a number for each curve that chooses color, dashes and
    marks, by default its place."""
    points = [curve.series.finite() for curve in curves]
    xs = [x for each in points for x, _ in each]
    ys = [y for each in points for _, y in each] + list(_bound_values(curves))
    log = _is_wide(ys) and not share
    low, high = _range(ys, log, share)
    yvalues = _log_ticks(low, high) if log else ticks(low, high, 5)
    ylabels = [short(value) for value in yvalues] if log else tick_labels(yvalues)
    left = 14 + LETTER * max((len(text) for text in ylabels), default=1) + (16 if unit else 0)
    x0 = min(xs, default=0.0)
    x1 = max(xs, default=1.0)
    if x0 == x1:  # one point stands in the middle
        x0 -= 1
        x1 += 1
    across = _Scale(x0, x1, left, WIDTH - RIGHT)
    up = _Scale(low, high, HEIGHT - BOTTOM, TOP, log)
    xvalues = [value for value in ticks(x0, x1, 5) if value == int(value) and value >= 0]
    return Chart(
        title=title,
        unit=unit + (" (log scale)" if log else ""),
        xlabel=xlabel,
        left=round(left, 1),
        xticks=[(across(value), f"{value:,.0f}") for value in xvalues],
        yticks=[(up(v), text) for v, text in zip(yvalues, ylabels, strict=True)],
        lines=[
            _line(number, curve, each, across, up)
            for number, curve, each in zip(
                styles or range(len(curves)), curves, points, strict=True
            )
        ],
        resumed=[across(step) for step in resumed if x0 <= step <= x1],
        remarks=list(_remarks(curves, points)),
        data=_pointer_data(curves, points, across),
        label=_label(title, xlabel, curves, points),
        named=styles is not None,
    )


def _bound_values(curves: Sequence[Curve]) -> Iterator[float]:
    for curve in curves:
        for series in (curve.low, curve.high):
            if series is not None:
                yield from (value for _, value in series.finite())


def _is_wide(values: Sequence[float]) -> bool:
    if len(values) < 3 or min(values) <= 0:
        return False
    return max(values) > WIDE_RANGE * float(np.median(values))


def _range(values: Sequence[float], log: bool, share: bool) -> tuple[float, float]:
    """The ends of the vertical axis, a little beyond the values; rates and the like begin at 0."""
    if not values:
        return 0.0, 1.0
    low = min(values)
    high = max(values)
    if log:
        return low / 1.2, high * 1.2
    if share and low >= 0 and high <= 1:
        return 0.0, 1.0
    if low == high:
        room = abs(low) / 2 or 1.0
        return low - room, high + room
    room = 0.06 * (high - low)
    return (0.0 if 0 <= low < 0.3 * high else low - room), high + room


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    every = max(1, -(-len(powers) // 5))
    return [10.0**power for power in powers][::every]


def _line(number: int, curve: Curve, points: list, across: _Scale, up: _Scale) -> DrawnLine:
    thin = thinned(points)
    line = DrawnLine(
        curve.name,
        style=number % STYLES,
        dash=(number + number // STYLES) % STYLES,
        path=_path(curve, thin, across, up),
    )
    if curve.smoothed(len(points)):
        line.smooth = _path(curve, thinned(running_mean(points)), across, up)
    if curve.marked or len(points) <= FEW:
        line.marks = [(across(x), up(y)) for x, y in thin]
    if curve.low is not None and curve.high is not None:
        bounds = zip(curve.low.finite(), curve.high.finite(), strict=False)
        line.bounds = [(across(x), up(low), up(high)) for (x, low), (_, high) in bounds][-FEW:]
    return line


def _path(curve: Curve, points: list, across: _Scale, up: _Scale) -> str:
    """An SVG path; it is interrupted where a value was no number."""
    values = zip(curve.series.steps, curve.series.values, strict=True)
    gaps = [x for x, y in values if not math.isfinite(y)]
    words = []
    passed = -1
    for x, y in points:
        before = passed
        passed = bisect_left(gaps, x)
        words.append(f"{'L' if passed == before else 'M'}{across(x):g} {up(y):g}")
    return "".join(words)


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most :data:`MOST_POINTS` of ``points``: of each stretch the lowest and the highest, so
    that no spike is lost."""
    if len(points) <= MOST_POINTS:
        return points
    stretches = np.array_split(np.arange(len(points)), MOST_POINTS // 2)
    values = np.array([y for _, y in points])
    kept = {0, len(points) - 1}
    for stretch in stretches:
        kept |= {int(stretch[values[stretch].argmin()]), int(stretch[values[stretch].argmax()])}
    return [points[index] for index in sorted(kept)]


def running_mean(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The mean of the values around each point, a twentieth of all."""
    half = max(1, smooth_over(len(points)) // 2)
    values = np.array([y for _, y in points])
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(points))
    start = np.maximum(index - half, 0)
    end = np.minimum(index + half + 1, len(points))
    means = (sums[end] - sums[start]) / (end - start)
    return [(x, float(mean)) for (x, _), mean in zip(points, means, strict=True)]


def smooth_over(count: int) -> int:
    """How many of ``count`` points a running mean is over."""
    return 2 * max(1, count // 40) + 1


def _remarks(curves: Sequence[Curve], points: Sequence[list]) -> Iterator[str]:
    smooth = [
        len(each) for curve, each in zip(curves, points, strict=True) if curve.smoothed(len(each))
    ]
    if smooth:
        yield f"bold: mean of {smooth_over(max(smooth))} values"
    for curve, each in zip(curves, points, strict=True):
        missing = len(curve.series.values) - len(each)
        if missing:
            yield f"{curve.name}: {missing} of {len(curve.series.values)} values are not finite"


def _pointer_data(curves: Sequence[Curve], points: Sequence[list], across: _Scale) -> str:
    data: dict[str, Any] = {
        "x": [across.low, across.high, across.start, across.end],
        "lines": [
            {"name": curve.name, "at": [[x, short(y)] for x, y in thinned(each)]}
            for curve, each in zip(curves, points, strict=True)
        ],
    }
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))


def _label(title: str, xlabel: str, curves: Sequence[Curve], points: Sequence[list]) -> str:
    """The chart in words, for who cannot see it."""
    told = [
        f"{curve.name} {short(each[0][1])} at {xlabel} {each[0][0]:g}, {short(each[-1][1])} at "
        f"{each[-1][0]:g}"
        for curve, each in zip(curves, points, strict=True)
        if each
    ]
    return f"{title} by {xlabel}: {'; '.join(told) or 'no values'}"
