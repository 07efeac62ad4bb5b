"""report.html of one run: a self-contained page, its charts drawn from the run's files."""

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from coati.dataset.report.html import page_environment
from coati.trainer.run_report import run_summary
from coati.trainer.run_report.curves import Chart, Curve, chart, short
from coati.trainer.run_report.metric_panels import BOUNDS, EVAL, Panel, label_of, panels_of
from coati.trainer.run_report.run_files import RunFiles, now

HERE = Path(__file__).parent
POINTER = "pointer.js.jinja"


@cache
def templates() -> jinja2.Environment:
    """The templates of the run report, with the filters that they use."""
    environment = page_environment(HERE)
    environment.filters |= {
        "short": short,
        "duration": run_summary.duration,
        "when": run_summary.local,
        "setting": setting,
    }
    environment.globals |= {"script_hash": script_hash(), "now": now, "label_of": label_of}
    return environment


def script_hash() -> str:
    """What the page's security policy knows its one script by."""
    text = (HERE / POINTER).read_text(encoding="utf-8")
    digest = hashlib.sha256(text.rstrip("\n").encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def setting(value: Any) -> str:
    """The value of a flag as it is typed."""
    if value is None or value == []:
        return "not given"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def run_page(run: RunFiles, live: bool = False) -> str:
    """The page of ``run`` as HTML. ``live``: it is written by the run itself."""
    pairs, samples = run_summary.samples_of(run)
    changed, unchanged = run_summary.settings_of(run)
    return (
        templates()
        .get_template("run_page.html.jinja")
        .render(
            run=run,
            name=run.folder.absolute().name,
            method=run_summary.short_method(run),
            long_method=run_summary.METHODS.get(run_summary.method_of(run), ""),
            model=run_summary.model_of(run),
            data=run_summary.data_of(run),
            unit=run_summary.unit_of(run),
            total=run_summary.total_of(run),
            status=run_summary.status_of(run, live),
            began=run_summary.began_at(run),
            resumed=run_summary.resumed_at(run),
            evaluations=run_summary.evaluations_of(run),
            warnings=run_summary.warnings_of(run),
            notes=run_summary.notes_of(run),
            remarks=run.remarks(),
            times=run_summary.times_of(run),
            memory=run_summary.memory_of(run),
            parts=run_summary.parts_of(run),
            groups=charts_of(run),
            pairs=pairs,
            samples=samples,
            changed=changed,
            unchanged=unchanged,
            versions=list(run_summary.versions(run)),
        )
    )


def charts_of(run: RunFiles) -> dict[str, list[Chart]]:
    """Heading -> charts."""
    unit = run_summary.unit_of(run)
    resumed = run_summary.resumed_at(run)
    return {
        title: [_chart(run, panel, names, unit, resumed) for panel, names in panels]
        for title, panels in panels_of(run.metrics).items()
    }


def _chart(
    run: RunFiles, panel: Panel, names: Sequence[str], unit: str, resumed: Sequence[float]
) -> Chart:
    curves = [curve_of(run, name, label_of(name), panel) for name in names]
    alone = len(names) == 1 and names[0].startswith(EVAL)
    return chart(
        panel.title + (", evaluation" if alone else ""),
        curves,
        xlabel=unit,
        unit=panel.unit,
        share=panel.share,
        resumed=resumed,
    )


def curve_of(run: RunFiles, name: str, label: str, panel: Panel) -> Curve:
    """The metric ``name`` of ``run`` as a curve called ``label`` in ``panel``, its bounds with
    it."""
    low, high = (run.metrics.get(name + end) for end in BOUNDS)
    marked = name.startswith(EVAL)
    return Curve(label, run.metrics[name], marked, low, high, panel.noisy)
