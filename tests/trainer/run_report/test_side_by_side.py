"""Several runs on one page."""

import pytest

from coati.trainer.run_report.run_files import open_run
from coati.trainer.run_report.side_by_side import (
    differing_settings,
    evaluations,
    overlaid,
    run_names,
    side_by_side,
)
from tests.trainer.run_report.made_runs import ARGUMENTS, STARTED, event, made_run
from tests.trainer.run_report.test_run_page import text_of

BETTER = [
    {"step": 10, "train/loss": 2.0, "eval/loss": 1.25},
    {"step": 20, "train/loss": 1.0, "eval/loss": 1.5, "train/extra": 1.0},
]


@pytest.fixture
def runs(tmp_path):
    made_run(tmp_path / "out/first", events=[STARTED, event("finished", 40)])
    made_run(tmp_path / "out/deep/second", BETTER, arguments=ARGUMENTS | {"lr": 1e-5, "new": [1]})
    return [open_run(tmp_path / "out/first"), open_run(tmp_path / "out/deep/second")]


def test_names_leave_out_what_is_common(runs, tmp_path):
    assert run_names([run.folder for run in runs]) == ["first", "deep/second"]
    with pytest.raises(ValueError, match="out/first is named twice"):
        run_names([tmp_path / "out/first", tmp_path / "out/first"])


def test_only_settings_that_differ(runs):
    assert differing_settings(runs) == {"lr": ["2e-05", "1e-05"], "new": ["", "1"]}


def test_the_best_last_value_is_marked(runs):
    rows = {row["label"]: row for row in evaluations(runs)}
    assert [cell.last for cell in rows["loss"]["cells"]] == [(40, 1.625), (20, 1.5)]
    assert rows["loss"]["best"] == 1.5
    assert rows["perplexity"]["cells"][1] is None and rows["perplexity"]["best"] is None


def test_losses_of_two_methods_are_not_ranked(tmp_path):
    made_run(tmp_path / "a")
    made_run(tmp_path / "b", BETTER, events=[STARTED | {"method": "dpo"}])
    rows = {
        row["label"]: row
        for row in evaluations([open_run(tmp_path / "a"), open_run(tmp_path / "b")])
    }
    assert rows["loss"]["best"] is None and len(rows["loss"]["cells"]) == 2


def test_one_metric_is_one_chart_with_a_line_a_run(runs):
    groups = overlaid(["first", "second"], runs)
    lines = {
        chart.title: [line.name for line in chart.lines]
        for charts in groups.values()
        for chart in charts
    }
    assert lines["Loss, evaluation"] == lines["Loss, training"] == ["first", "second"]
    assert lines["Learning rate"] == ["first"]
    assert lines["extra"] == ["second"]


def test_a_run_looks_alike_in_every_chart(runs):
    [chart] = [c for c in overlaid(["first", "second"], runs)["Other metrics"]]
    assert chart.lines[0].style == 1  # the second run's, though it is the only line


def test_the_page_says_it_all(runs):
    page = side_by_side(runs)
    text = text_of(page)
    assert text.startswith("2 runs side by side")
    assert "first SFT small-135m finished after step 40 40 steps" in text
    assert "1.5 best 1.25 at 10" in text
    assert "<strong>1.5</strong>" in page and "<strong>1.625</strong>" not in page
    assert "lr 2e-05 1e-05" in text


def test_runs_that_differ_in_nothing_say_so(tmp_path):
    for name in ("a", "b"):
        made_run(tmp_path / name)
    page = side_by_side([open_run(tmp_path / "a"), open_run(tmp_path / "b")])
    assert "None, but for where they were written." in page
