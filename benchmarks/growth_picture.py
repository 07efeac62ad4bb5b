"""Curves of bench_growth.py as an SVG: for each axis the time of a step, the share of its parts,
and memory, both axes logarithmic, with points that were measured and curves that were fitted."""

import io
from typing import Any

from benchmarks.growth_fit import Curve, plain

# Metadata that would differ from run to run
NO_METADATA = {"Date": None, "Creator": None}
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "coati", "font.size": 9}
SAMPLES = 60
SMALLEST_SHARE = 0.02  # of the shortest step, that a part is shown from
COLOR = "#1f5fa8"
# Of the parts that take most at the last point
PART_COLORS = ("#b3541e", "#3d7d3a", "#7a4ea3", "#a8851f", "#555555")


def draw(axes: dict[str, dict[str, Any]]) -> str:
    """``axes``: what :func:`benchmarks.bench_growth.growth` found, by name, with ``what`` x is."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 2.8 * len(axes)), layout="constrained")
        panels = figure.subplots(len(axes), 2, squeeze=False)
        for (time, memory), (name, found) in zip(panels, axes.items(), strict=True):
            _panel(time, found, "seconds", "s", f"{name}: time")
            parts = sorted(found["parts"], key=lambda part: -found["parts"][part]["ys"][-1])
            for color, part in zip(PART_COLORS, parts, strict=False):
                xs = [point["x"] for point in found["points"]]
                time.plot(xs, found["parts"][part]["ys"], color=color, lw=0.8, label=part)
            # A part that takes next to nothing would stretch the panel over many decades.
            if parts:
                time.set_ylim(bottom=SMALLEST_SHARE * min(found["seconds"]["ys"]))
            _panel(memory, found, "mib", "MiB", f"{name}: memory")
            for panel in (time, memory):  # beside it, where no curve runs through the words
                panel.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", facecolor="white", metadata=NO_METADATA)
    return drawn.getvalue()


def _panel(panel: Any, found: dict[str, Any], name: str, unit: str, title: str) -> None:
    one = found[name]
    xs = [point["x"] for point in found["points"]]
    fitted = Curve(one["constant"], one["linear"], one["quadratic"])
    between = [xs[0] * (xs[-1] / xs[0]) ** (i / (SAMPLES - 1)) for i in range(SAMPLES)]
    panel.plot(xs, one["ys"], "o", color=COLOR, label="measured")
    panel.plot(between, [fitted.at(x) for x in between], color=COLOR, lw=1, label="fitted")
    low = one["linear_from"]
    high = one["linear_to"]
    said = ("linear from", "linear up to")
    if high < low:
        said = ("constant part matters up to", "quadratic part matters from")
    for place, word, style in zip((low, high), said, (":", "--"), strict=True):
        if xs[0] < place < xs[-1]:
            label = f"{word} {plain(place)}"
            panel.axvline(place, color="#999999", ls=style, lw=1, label=label)
    panel.set(xscale="log", yscale="log", xlabel=found["what"], ylabel=unit)
    _plain_numbers(panel.xaxis)
    _plain_numbers(panel.yaxis)
    panel.set_title(f"{title} as x^{one['exponent']:.2f}", fontsize=9, loc="left")
    panel.spines[["top", "right"]].set_visible(False)


def _plain_numbers(axis: Any) -> None:
    """2,000, not 2 x 10^3; where a decade is wide, between its ends too."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.set_tick_params(labelsize=7)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))
    axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
