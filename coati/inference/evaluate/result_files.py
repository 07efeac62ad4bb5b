"""What an evaluation leaves: results.json, a table for a terminal and a page, and a picture."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coati.inference.evaluate.measure_table import (
    PERPLEXITY,
    SHARE,
    Comparison,
    Measure,
)
from coati.inference.evaluate.score_rows import COLORS
from coati.utils.json_io import load_object, save_json, save_text
from coati.utils.phases import phase

RESULTS = "results.json"
TABLE = "results.md"
PICTURE = "results.svg"
HEADER = ("measure", "value", "95% interval", "rows")
COMPARED = ("baseline", "here", "difference (95%)", "p", "verdict")
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "coati", "font.size": 11}


def shown(value: float) -> str:
    """Four digits; a bound that is not known as a dash."""
    return f"{value:.4g}" if math.isfinite(value) else "-"


def rows_of(measures: Sequence[Measure]) -> list[list[str]]:
    """The cells of the table of measures."""
    return [
        [
            each.name,
            shown(each.value),
            f"{shown(each.low)} to {shown(each.high)}",
            f"{len(each.rows)}",
        ]
        for each in measures
    ]


def rows_of_comparisons(found: Sequence[Comparison]) -> list[list[str]]:
    """The cells of the table beside a baseline."""
    return [
        [
            each.name,
            shown(each.before),
            shown(each.now),
            ("x" if each.unit == PERPLEXITY else "")
            + f"{shown(each.difference)} ({shown(each.low)} to {shown(each.high)})",
            f"{each.p:.3g} ({each.test}: {each.better} better, {each.worse} worse)",
            each.verdict,
        ]
        for each in found
    ]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of a Markdown page."""
    lines = [f"| {' | '.join(header)} |", f"| {' | '.join(['---'] * len(header))} |"]
    lines += [f"| {' | '.join(each.replace('|', chr(92) + '|') for each in row)} |" for row in rows]
    return "\n".join(lines)


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table in columns of a terminal."""
    whole = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in whole) for column in range(len(header))]
    lines = []
    for row in whole:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def write_results(
    folder: Path,
    about: Mapping[str, Any],
    measures: Sequence[Measure],
    compared: Sequence[Comparison],
    baseline: Sequence[Measure] = (),
) -> None:
    """Everything in ``folder``, results.json last: where it is, the rest is too."""
    text = f"# Evaluation of {about.get('model')}\n\n{markdown(HEADER, rows_of(measures))}\n"
    if compared:
        header = ("measure", *COMPARED)
        text += f"\nAgainst {about.get('baseline')}:\n\n"
        text += f"{markdown(header, rows_of_comparisons(compared))}\n"
    save_text(text, folder / TABLE)
    save_text(picture(measures, baseline), folder / PICTURE)
    found = {
        **about,
        "measures": [_finite(each.as_dict()) for each in measures],
        "compared": [_finite({**vars(each), "verdict": each.verdict}) for each in compared],
    }
    save_json(found, folder / RESULTS)


def _finite(found: Mapping[str, Any]) -> dict[str, Any]:
    """Infinite bounds are no JSON."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in found.items()
    }


def read_results(path: str) -> tuple[dict[str, Any], list[Measure]]:
    """What :func:`write_results` wrote into ``path``, or is the file itself.

    Raises ValueError naming the file for anything else.
    """
    file = Path(path) / RESULTS if Path(path).is_dir() else Path(path)
    try:
        found = load_object(file)
        measures = [
            Measure.from_dict({"low": -math.inf, "high": math.inf, **_there(each)})
            for each in found["measures"]
        ]
    except OSError as error:
        raise ValueError(
            f"{file}: {error.strerror}; expected the --output_dir of another coati evaluate"
        ) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not written by coati evaluate ({error!r})") from error
    return found, measures


def _there(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if value is not None}


@phase("drawing the picture")
def picture(measures: Sequence[Measure], baseline: Sequence[Measure] = ()) -> str:
    """An SVG: each measure with its 95% interval, shares, scores and perplexities on axes of their
    own, beside what it was in the baseline."""
    import matplotlib
    from matplotlib.figure import Figure

    units = list(dict.fromkeys(each.unit for each in measures))
    heights = [sum(each.unit == unit for each in measures) + 1.5 for unit in units]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 0.35 * sum(heights) + 0.6 * len(units)), layout="constrained")
        panels = figure.subplots(len(units), height_ratios=heights, squeeze=False)[:, 0]
        for axes, unit in zip(panels, units, strict=True):
            _draw(axes, unit, measures, baseline)
        if baseline:
            handles, labels = panels[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    return drawn.getvalue()


def _draw(axes: Any, unit: str, measures: Sequence[Measure], baseline: Sequence[Measure]) -> None:
    names = [each.name for each in measures if each.unit == unit]
    sets = {"here": (measures, 0.0, COLORS[0], "o")}
    if baseline:
        sets = {
            "baseline": (baseline, 0.15, COLORS[1], "s"),
            "here": (measures, -0.15, COLORS[0], "o"),
        }
    for label, (found, shift, color, mark) in sets.items():
        named = {each.name: each for each in found if each.unit == unit}
        here = [name for name in names if name in named]
        values = [named[name].value for name in here]
        places = [names.index(name) + shift for name in here]
        bars = [
            [
                max(0.0, value - named[name].low) if math.isfinite(named[name].low) else 0.0
                for name, value in zip(here, values, strict=True)
            ],
            [
                max(0.0, named[name].high - value) if math.isfinite(named[name].high) else 0.0
                for name, value in zip(here, values, strict=True)
            ],
        ]
        axes.errorbar(values, places, xerr=bars, fmt=mark, color=color, capsize=3, label=label)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel({SHARE: "share of the rows"}.get(unit, unit))
    if unit == SHARE:
        axes.set_xlim(0, 1)
    axes.grid(axis="x", alpha=0.4)
    axes.spines[["top", "right"]].set_visible(False)
