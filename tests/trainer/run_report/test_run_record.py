"""The report of a run that is going on: when it is written, by whom, and what happens when it
cannot be."""

import json

import pytest

from coati.trainer.run_log import RunLog
from coati.trainer.run_report import run_page
from coati.trainer.run_report.run_record import RunRecord
from coati.trainer.schedule import RunSchedule
from coati.utils.logging import forget_warnings, get_logger, take_warnings


def events(folder, kind=None):
    rows = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if kind in (None, row["event"])]


def begun(folder, step=0, stored=None):
    log = RunLog("sft", RunSchedule(str(folder)), stored or {}, {"pretrain": "a/b"})
    log.open(step, None, False, 10)
    return log


@pytest.fixture(autouse=True)
def fresh():
    forget_warnings()
    take_warnings()


def page(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def test_a_run_from_start_to_end(tmp_path):
    log = begun(tmp_path)
    assert "running, step 0 of 10" in page(tmp_path)
    log.tracker.log({"train/loss": 1.5}, 5)
    log.evaluated({"loss": 1.25}, 5)
    log.record.update(5)
    assert "running, step 5 of 10" in page(tmp_path) and "1.25" in page(tmp_path)
    log.finish(10, stopped=False, notes=["verdict: good"])
    assert "finished after step 10" in page(tmp_path) and "verdict: good" in page(tmp_path)
    assert "SFT of b" in page(tmp_path)
    log.close()


@pytest.mark.parametrize("step", [10, 12])
def test_a_run_with_nothing_left_says_so(tmp_path, capsys, step):
    begun(tmp_path, step)
    assert f"of step {step}, and the run has 10 in all: nothing is left" in capsys.readouterr().err
    begun(tmp_path, 9)
    assert "nothing is left" not in capsys.readouterr().err


@pytest.mark.parametrize("stopped, word", [(True, "stopped"), (False, "finished")])
def test_how_it_ended(tmp_path, stopped, word):
    begun(tmp_path).finish(3, stopped)
    assert f"{word} after step 3" in page(tmp_path)


def test_an_error_is_in_the_page(tmp_path):
    begun(tmp_path).fail(RuntimeError("the loss of this step is nan"), 3)
    assert "failed at step 3" in page(tmp_path)
    assert "RuntimeError: the loss of this step is nan" in page(tmp_path)


def test_a_resumed_run_appends(tmp_path):
    first = begun(tmp_path)
    first.record.note("early", 2)
    first.record.note("late", 8)
    first.finish(8, stopped=True)
    second = begun(tmp_path, step=5, stored={"evaluated": {}})
    assert [row["event"] for row in events(tmp_path) if row["event"] != "times"] == [
        "started",
        "warning",
        "stopped",
        "resumed",
    ]  # the warning of step 8 belongs to a step that is taken again
    second.finish(10, stopped=False)
    assert "Resumed once, at step 5" in page(tmp_path)


def test_a_new_run_in_the_same_place_forgets_the_old_one(tmp_path):
    begun(tmp_path).record.note("old", 2)
    begun(tmp_path)
    assert events(tmp_path, "warning") == []
    assert len(events(tmp_path, "started")) == 1


def test_warnings_of_the_logger_are_collected_once(tmp_path):
    logger = get_logger("coati.some.module")
    logger.warning("before it was opened")
    log = begun(tmp_path)
    logger.warning("later")
    logger.info("not a warning")
    log.record.update(4)
    log.finish(5, stopped=False)
    assert [(row["step"], row["text"]) for row in events(tmp_path, "warning")] == [
        (0, "before it was opened"),
        (4, "later"),
    ]
    assert "before it was opened" in page(tmp_path)


def test_times_of_phases(tmp_path):
    log = begun(tmp_path)
    with log.record.timed("evaluation"):
        pass
    log.record.add_seconds("training", 2.5)
    log.record.add_seconds("training", 1.5)
    log.finish(1, stopped=False)
    seconds = events(tmp_path, "times")[-1]["seconds"]
    assert seconds["training"] == 4.0
    assert set(seconds) == {"training", "evaluation", "this report"}


@pytest.mark.parametrize("error", [ValueError("broken"), OSError("disk full"), KeyError("x")])
def test_a_report_that_fails_is_said_once_and_ends_nothing(tmp_path, monkeypatch, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(run_page, "run_page", fails)
    log = begun(tmp_path)
    log.record.update(1)
    log.finish(2, stopped=False)
    [said] = [row["text"] for row in events(tmp_path, "warning")]
    assert type(error).__name__ in said and f"coati report {tmp_path}" in said
    assert not (tmp_path / "report.html").exists()


def test_the_page_is_whole_or_the_one_before(tmp_path, monkeypatch):
    log = begun(tmp_path)
    before = page(tmp_path)

    def fails(*_):
        raise OSError("killed while renaming")

    with monkeypatch.context() as patch:
        patch.setattr("coati.utils.json_io.os.replace", fails)
        log.tracker.log({"train/loss": 1.5}, 5)
        log.record.update(5)
    assert page(tmp_path) == before
    assert [path.name for path in tmp_path.glob(".*tmp")] == []


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    log = begun(tmp_path)
    log.record.note("x", 1)
    log.record.update(1)
    log.finish(2, stopped=False)
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_a_directory_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = RunLog("sft", RunSchedule(None), {})
    log.open(0, None, False, 10)
    log.fail(ValueError("x"), 1)
    RunRecord(None, "sft", {}).update(1)
    assert list(tmp_path.iterdir()) == []
