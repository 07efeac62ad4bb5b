"""metrics.jsonl and its companions: what is written, and what a resumed run keeps of it."""

import json
import sys
import types

import pytest

from coati.utils import tracker_table, tracking
from coati.utils.logging import forget_warnings
from coati.utils.tracker_table import TRACKERS, named
from coati.utils.tracking import JsonlTracker, Tracker, make_tracker


@pytest.fixture
def file(tmp_path):
    """Reports of the steps 0, 2 and 4, the last line cut by a kill."""
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0 / (step + 1)}) + "\n" for step in (0, 2, 2, 4)]
    path.write_text("".join(lines) + '{"step": 5, "lo')
    return path


def steps(path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "keep_to, kept", [(4, [0, 2, 2, 4]), (3, [0, 2, 2]), (2, [0, 2, 2]), (1, [0]), (0, [])]
)
def test_a_resumed_run_keeps_what_its_checkpoint_had_seen(file, keep_to, kept):
    tracker = JsonlTracker(file, keep_to)
    tracker.log({"loss": 0.5}, 9)
    tracker.close()
    assert steps(file) == [*kept, 9]
    assert json.loads(file.read_text().splitlines()[-1]) == {"step": 9, "loss": 0.5}


def test_every_line_is_on_disk_at_once(tmp_path):
    tracker = make_tracker(tmp_path / "deep" / "metrics.jsonl")
    tracker.log({"loss": 2.0}, 1)
    assert steps(tmp_path / "deep" / "metrics.jsonl") == [1]


def test_a_full_disk_ends_no_training(caplog):
    """Of /dev/full: every write is refused as by a disk without room."""
    forget_warnings()
    full = JsonlTracker.__new__(JsonlTracker)
    full.place = "metrics.jsonl"
    full._file = open("/dev/full", "w")
    other = Kept()
    tracker = Tracker([full, other])
    for step in (1, 2):
        tracker.log({"loss": 1.0}, step)
    tracker.close()
    assert other.steps == [1, 2]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "metrics.jsonl could not be written (No space left" in said[0]


class Kept(Tracker):
    def __init__(self):
        super().__init__()
        self.steps = []

    def log(self, metrics, step):
        self.steps.append(step)


def test_tensorboard_gets_the_same_numbers(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracker = make_tracker(tmp_path / "metrics.jsonl", tmp_path / "events")
    tracker.log({"train/loss": 2.0}, 1)
    tracker.log({"train/loss": 1.5}, 2)
    tracker.close()
    events = reader.EventAccumulator(str(tmp_path / "events")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (1, 2.0),
        (2, 1.5),
    ]


def test_tensorboard_shows_the_settings(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = {"lr": 2e-5, "dataset": ["a", "b"], "max_steps": None}
    make_tracker(None, tmp_path / "events", config=config).close()
    events = reader.EventAccumulator(str(tmp_path / "events")).Reload()
    [event] = events.Tensors("settings/text_summary")
    assert event.tensor_proto.string_val[0].decode().splitlines() == [
        "| setting | value |",
        "| --- | --- |",
        "| lr | 2e-05 |",
        "| dataset | ['a', 'b'] |",
        "| max_steps |  |",
    ]


def test_wandb_gets_the_settings(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    asked = []

    class Run:
        def finish(self) -> None: ...

    def init(**keywords):
        asked.append(keywords)
        return Run()

    monkeypatch.setattr(wandb, "init", init)
    make_tracker(None, use_wandb=True, project="p", config={"lr": 1.0}).close()
    assert asked == [{"project": "p", "config": {"lr": 1.0}, "dir": None}]


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "is_rank_0", lambda: False)
    tracker = make_tracker(tmp_path / "metrics.jsonl", tmp_path / "events", use_wandb=True)
    tracker.log({"loss": 1.0}, 1)
    tracker.close()
    assert type(tracker) is Tracker and not list(tmp_path.iterdir())


COLUMNS = ["prompt", "response", "reward", "KL"]
ROWS = [["1 + 1?", "2 | two\nlines", 1.0, None], ["数", "", -0.51234, 2.5]]


def test_samples_are_written_beside_the_metrics_and_cut_with_them(tmp_path):
    for keep_to, kept in ((0, []), (3, [3, 3]), (5, [3, 3, 5, 5])):
        tracker = make_tracker(tmp_path / "metrics.jsonl", keep_to=keep_to)
        for step in (3, 5):
            if step > keep_to:
                tracker.table(COLUMNS, ROWS, step)
        tracker.close()
        assert steps(tmp_path / "samples.jsonl")[: len(kept)] == kept
    assert steps(tmp_path / "samples.jsonl") == [3, 3, 5, 5]
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 3, "prompt": "1 + 1?", "response": "2 | two\nlines", "reward": 1.0}
    assert lines[1] == {"step": 3, "prompt": "数", "response": "", "reward": -0.51234, "KL": 2.5}


def test_samples_in_tensorboard_are_a_table(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracker = make_tracker(None, tmp_path / "events")
    tracker.table(COLUMNS, ROWS, 4)
    tracker.close()
    events = reader.EventAccumulator(str(tmp_path / "events")).Reload()
    [event] = events.Tensors("samples/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert event.step == 4 and text.splitlines() == [
        "| prompt | response | reward | KL |",
        "| --- | --- | --- | --- |",
        "| 1 + 1? | 2 \\| two lines | 1 |  |",
        "| 数 |  | -0.5123 | 2.5 |",
    ]


def test_samples_in_wandb_are_its_table(tmp_path, monkeypatch):
    """Offline: nothing leaves the machine."""
    wandb = pytest.importorskip("wandb")
    logged = []
    monkeypatch.setattr(
        wandb,
        "init",
        lambda **_: type(
            "Run",
            (),
            {
                "log": lambda self, what, step: logged.append((what, step)),
                "finish": lambda self: None,
            },
        )(),
    )
    monkeypatch.setattr(wandb, "Table", lambda columns, data: (columns, data))
    tracker = make_tracker(None, use_wandb=True)
    tracker.table(COLUMNS, ROWS, 4)
    tracker.close()
    assert logged == [({"samples": (COLUMNS, ROWS)}, 4)]


def test_wandb_goes_on_in_the_same_run_without_a_step_twice(tmp_path, monkeypatch):
    """The run has seen steps up to 6; a resumed one logs again from 5 on."""
    wandb = pytest.importorskip("wandb")
    asked: list[dict] = []
    logged: list[int] = []
    changed: list[dict] = []

    class Run:
        step = 7
        resumed = True

        class config:
            @staticmethod
            def update(values, allow_val_change):
                changed.append(values)

        def log(self, what, step) -> None:
            logged.append(step)

        def finish(self) -> None: ...

    monkeypatch.setattr(wandb, "init", lambda **keywords: asked.append(keywords) or Run())
    tracker = make_tracker(None, use_wandb=True, config={"lr": 1}, run_id="abc")
    for step in (5, 6, 7, 8):
        tracker.log({"loss": 1.0}, step)
    tracker.table(COLUMNS, ROWS, 6)
    tracker.close()
    assert (asked[0]["id"], asked[0]["resume"]) == ("abc", "allow")
    assert logged == [7, 8] and changed == [{"lr": 1}]


def test_a_run_without_a_directory_is_a_new_one_in_wandb(monkeypatch):
    wandb = pytest.importorskip("wandb")
    asked: list[dict] = []

    class Run:
        def finish(self) -> None: ...

    monkeypatch.setattr(wandb, "init", lambda **keywords: asked.append(keywords) or Run())
    make_tracker(None, use_wandb=True).close()
    assert "id" not in asked[0] and "resume" not in asked[0]


def test_tensorboard_goes_on_where_the_checkpoint_stood(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for keep_to, steps_logged in ((0, (1, 2, 3)), (2, (3, 4))):
        tracker = make_tracker(None, tmp_path, keep_to=keep_to)
        for step in steps_logged:
            tracker.log({"loss": float(10 * keep_to + step)}, step)
        tracker.close()
    events = reader.EventAccumulator(str(tmp_path)).Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0)]


# The table


class Trackio(types.ModuleType):
    """What the library uses of trackio, with the database in memory."""

    def __init__(self, next_step: int = 0) -> None:
        super().__init__("trackio")
        self.asked: list[dict] = []
        self.logged: list[tuple[int, dict]] = []
        self.finished = 0
        self.next_step = next_step

    def init(self, **keywords):
        self.asked.append(keywords)
        log = lambda metrics, step: self.logged.append((step, metrics))  # noqa: E731
        return types.SimpleNamespace(log=log, _next_step=self.next_step)

    def Table(self, columns, data):
        return columns, data

    def finish(self) -> None:
        self.finished += 1


def test_trackio_gets_metrics_tables_and_settings(monkeypatch):
    there = Trackio()
    monkeypatch.setitem(sys.modules, "trackio", there)
    tracker = make_tracker(None, report_to=["trackio"], project="p", config={"lr": 1.0})
    tracker.log({"loss": 2.0}, 3)
    tracker.table(COLUMNS, ROWS, 3)
    tracker.close()
    assert there.asked == [{"project": "p", "config": {"lr": 1.0}, "embed": False}]
    assert there.logged == [(3, {"loss": 2.0}), (3, {"samples": (COLUMNS, ROWS)})]
    assert there.finished == 1


def test_trackio_goes_on_in_the_same_run_without_a_step_twice(monkeypatch):
    there = Trackio(next_step=7)
    monkeypatch.setitem(sys.modules, "trackio", there)
    tracker = make_tracker(None, report_to=["trackio"], run_id="abc")
    for step in (5, 6, 7, 8):
        tracker.log({"loss": 1.0}, step)
    assert (there.asked[0]["name"], there.asked[0]["resume"]) == ("abc", "allow")
    assert [step for step, _ in there.logged] == [7, 8]


def test_the_older_flags_and_the_table_name_the_same_trackers(tmp_path, monkeypatch):
    assert set(tracking._MAKERS) == set(TRACKERS)

    class Named(Tracker):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

    made = {name: (lambda start, name=name: Named(name)) for name in TRACKERS}
    monkeypatch.setattr(tracking, "_MAKERS", made)

    def names(*args, **keywords) -> list[str]:
        return [tracker.name for tracker in make_tracker(None, *args, **keywords)._trackers]

    assert names() == [] and names(report_to=["none"]) == []
    assert names(tmp_path, True) == names(tmp_path, report_to=["wandb,tensorboard"])
    assert names(tmp_path, True) == ["tensorboard", "wandb"]
    assert names(report_to=["trackio"], use_wandb=True) == ["wandb", "trackio"]


def test_trackers_that_there_are_not(monkeypatch):
    with pytest.raises(ValueError, match="--report_to mlflow: runs are reported to tensorboard,"):
        make_tracker(None, report_to=["mlflow"])
    with pytest.raises(ValueError, match="--report_to none wandb: leave none or the others out"):
        named(["none", "wandb"])
    monkeypatch.setattr(tracker_table, "find_spec", lambda name: None)
    said = tracker_table.missing_problem("trackio")
    assert said == "--report_to trackio: trackio is not installed; run: pip install trackio"
