"""Several runs on one page: the same metric in one chart, the settings that differ, the evaluations
beside each other."""

from collections.abc import Sequence
from os.path import commonpath
from pathlib import Path
from typing import Any

from coati.trainer.run_report import run_summary
from coati.trainer.run_report.curves import Chart, chart
from coati.trainer.run_report.metric_panels import EVAL, TRAIN, Panel, label_of, panels_of
from coati.trainer.run_report.run_files import RunFiles
from coati.trainer.run_report.run_page import curve_of, setting, templates

# Differ between any two runs, and say nothing about them.
OWN_PLACE = ("save_dir", "config_file", "log_dir", "config", "checkpoint_path")


def side_by_side(runs: Sequence[RunFiles]) -> str:
    """The page of ``runs`` as HTML."""
    names = run_names([run.folder for run in runs])
    return (
        templates()
        .get_template("side_by_side.html.jinja")
        .render(
            runs=[_told(name, run) for name, run in zip(names, runs, strict=True)],
            names=names,
            differing=differing_settings(runs),
            evaluations=evaluations(runs),
            groups=overlaid(names, runs),
        )
    )


def run_names(folders: Sequence[Path]) -> list[str]:
    """The folders without what is common to all of them; by their number where two are one."""
    whole = [folder.absolute().as_posix() for folder in folders]
    if len(set(whole)) < len(whole):
        raise ValueError(
            f"{next(one for one in whole if whole.count(one) > 1)} is named twice; a run is laid "
            "beside others"
        )
    common = commonpath([Path(one).parent.as_posix() for one in whole])
    return [Path(one).relative_to(common).as_posix() for one in whole]


def _told(name: str, run: RunFiles) -> dict[str, Any]:
    speed = run.metrics.get("train/tokens_per_second")
    memory = run_summary.memory_of(run)
    return {
        "name": name,
        "method": run_summary.short_method(run),
        "model": run_summary.model_of(run),
        "status": run_summary.status_of(run),
        "unit": run_summary.unit_of(run),
        "steps": run.last_step,
        "elapsed": run_summary.times_of(run).elapsed,
        "speed": None if speed is None else speed.last,
        "memory": max(memory.values(), default=None),
        "warnings": run_summary.warnings_of(run),
        "remarks": run.remarks(),
        "coati": run.environment.get("coati"),
    }


def differing_settings(runs: Sequence[RunFiles]) -> dict[str, list[str]]:
    """Flag -> its value in each run, of the flags that are not the same in all; "" where a run has
    no such flag."""
    names = sorted({name for run in runs for name in run.arguments} - set(OWN_PLACE))
    found = {}
    for name in names:
        values = [setting(run.arguments[name]) if name in run.arguments else "" for run in runs]
        if len(set(values)) > 1:
            found[name] = values
    return found


def evaluations(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """One row a metric of the evaluations: its name and what each run has of it, the best value of
    all marked."""
    of_runs = [{each.name: each for each in run_summary.evaluations_of(run)} for run in runs]
    rows = []
    for name in dict.fromkeys(name for of_run in of_runs for name in of_run):
        cells = [of_run.get(name) for of_run in of_runs]
        main = any(next(iter(of_run), None) == name for of_run in of_runs)
        lower = next(cell.lower_is_better for cell in cells if cell)
        better = min if lower else max
        finals = [cell.last[1] for cell in cells if cell and cell.last[1] == cell.last[1]]
        # A loss of one method says nothing beside that of another.
        methods = {
            run_summary.method_of(run) for run, cell in zip(runs, cells, strict=True) if cell
        }
        ranked = (lower or main) and len(finals) > 1 and len(methods) == 1
        rows.append(
            {
                "label": label_of(name).replace(", evaluation", ""),
                "cells": cells,
                "ranked": lower or main,
                "best": better(finals) if ranked else None,
            }
        )
    return rows


def overlaid(names: Sequence[str], runs: Sequence[RunFiles]) -> dict[str, list[Chart]]:
    """Heading -> charts, one a metric, with a line for each run that has it."""
    units = list(dict.fromkeys(run_summary.unit_of(run) for run in runs))
    groups: dict[str, list[Chart]] = {}
    for title, panels in panels_of(dict.fromkeys(n for run in runs for n in run.metrics)).items():
        for panel, metrics in panels:
            # Evaluations first: they are what runs are compared by.
            for metric in sorted(metrics, key=lambda name: not name.startswith(EVAL)):
                curves = [
                    curve_of(run, metric, name, panel)
                    for name, run in zip(names, runs, strict=True)
                    if metric in run.metrics
                ]
                groups.setdefault(title, []).append(
                    chart(
                        _title(panel, metric, metrics),
                        curves,
                        xlabel=" or ".join(units),
                        unit=panel.unit,
                        share=panel.share,
                        styles=[names.index(curve.name) for curve in curves],
                    )
                )
    return groups


def _title(panel: Panel, metric: str, metrics: Sequence[str]) -> str:
    """The panel's title where it has one metric a side, else the metric's own name."""
    sides = [name for name in metrics if name.startswith(EVAL) == metric.startswith(EVAL)]
    if len(sides) > 1:
        label = label_of(metric)
        return label[:1].upper() + label[1:]
    side = {EVAL: ", evaluation", TRAIN: ", training"}
    both = len({name.startswith(EVAL) for name in metrics}) > 1
    ending = next((text for start, text in side.items() if metric.startswith(start)), "")
    return panel.title + (ending if both or ending == side[EVAL] else "")
