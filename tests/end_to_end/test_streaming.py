"""Runs with --streaming that are killed (kill -9) and gone on with, to the bit: plugins, processes,
orders, templates and moments. tests/dataset/stream goes on from every step without a launch."""

import json
from itertools import product

import pytest

from coati.parallel.checkpoint import checkpoints
from tests.dataset.stream.streams import PER_TURN, write_files
from tests.distributed.spawn import WorkerFailed, run
from tests.end_to_end.inputs import metrics, weights
from tests.end_to_end.worker import Fault, Run

CPU = {"CUDA_VISIBLE_DEVICES": ""}
STEPS = 10  # of 4 rows; 32 rows of 35 can be used
PLUGINS = ("ddp", "zero2")
PROCESSES = (1, 2)
ORDERS = ("in order", "shuffled", "a row for each response")
# In a step after a checkpoint, in the middle of writing one, when it has its name.
MOMENTS = {
    "in a step": Fault("step", 6, "before"),
    "in a save": Fault("file", 11, "half"),
    "after a save": Fault("rename", 2, "after"),
}
RUNS = list(product(PLUGINS, PROCESSES, ORDERS))
CASES = [(*one, moment) for one in RUNS for moment in MOMENTS]
QUICK = ("zero2", 2, "shuffled")


@pytest.fixture(scope="module")
def words(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    rows = write_files(folder / "rows", 13, 1, 21, bad=(2, 14, 30))
    template = folder / "per_turn.json"
    template.write_text(json.dumps({"chat_template": PER_TURN}))

    def words(save_dir, plugin: str, processes: int, order: str, *more: str) -> list[str]:
        given = {
            "pretrain": model,
            "dataset": str(rows),
            "plugin": plugin,
            "mixed_precision": "fp32",
            "batch_size": "2",
            "accumulation_steps": str(2 // processes),
            "max_length": "128",
            "lr": "1e-3",
            "max_steps": str(STEPS),
            "save_interval": "2",
            "keep_last_k": "2",
            "max_bad_ratio": "0.1",
            "shuffle_buffer": "0" if order == "in order" else "8",
            "stream_workers": "1" if order == "shuffled" else "0",
            "save_dir": str(save_dir),
            "checkpoint_path": "auto",
        }
        if order == ORDERS[2]:
            given["conversation_template_config"] = str(template)
        asked = [word for name, value in given.items() for word in (f"--{name}", value)]
        return [*asked, "--streaming", *more]

    return words


def train_each(processes: int, runs: dict[str, Run], timeout: float):
    """What rank 0 of each run did."""
    target = "tests.end_to_end.streaming_worker:train_each"
    return run(processes, target, runs, env=CPU, timeout=timeout)[0]


def killed(processes: int, given: list[str], fault: Fault) -> None:
    with pytest.raises(WorkerFailed, match=r"--- rank 0 \(exit code -9\) ---"):
        target = "tests.end_to_end.streaming_worker:train"
        run(processes, target, Run(given, fault), env=CPU, timeout=200)


def check_same(folder, ended, whole_folder, whole) -> None:
    """The resumed run trained on what was left, and became the uninterrupted one."""
    assert ended.code == 0 and 0 < len(ended.rows) < STEPS
    assert ended.rows == whole.rows[STEPS - len(ended.rows) :]
    assert metrics(folder) == metrics(whole_folder)
    assert weights(folder) == weights(whole_folder) != {}
    assert len(checkpoints(folder)) == 2 and not list(folder.glob(".*"))


@pytest.mark.matrix
def test_a_killed_run_becomes_the_uninterrupted_one(words, tmp_path):
    killed(2, words(tmp_path / "killed", *QUICK), MOMENTS["in a step"])
    runs = {name: Run(words(tmp_path / name, *QUICK)) for name in ("whole", "killed")}
    ended = train_each(2, runs, 200)
    assert len(ended["whole"].rows) == STEPS and ended["whole"].code == 0
    check_same(tmp_path / "killed", ended["killed"], tmp_path / "whole", ended["whole"])


@pytest.fixture(scope="module")
def grid(words, tmp_path_factory):
    """(folder, {name of a run or case: Ended}) of all uninterrupted runs and all killed ones."""
    folder = tmp_path_factory.mktemp("grid")
    for *which, moment in CASES:
        place = folder / name_of(which, moment)
        killed(which[1], words(place, *which), MOMENTS[moment])
    ended = {}
    for processes in PROCESSES:
        of_size = [which for which in RUNS if which[1] == processes]
        whole = {name_of(one): Run(words(folder / name_of(one), *one)) for one in of_size}
        ended |= train_each(processes, whole, 400)
        rest = {
            name_of(one, moment): Run(words(folder / name_of(one, moment), *one))
            for one in of_size
            for moment in MOMENTS
        }
        ended |= train_each(processes, rest, 900)
    return folder, ended


def name_of(which, moment: str = "") -> str:
    return "-".join(map(str, [*which, moment])).replace(" ", "_")


@pytest.mark.slow
@pytest.mark.parametrize("plugin, processes, order, moment", CASES)
def test_killed_at_any_moment(grid, plugin, processes, order, moment):
    folder, ended = grid
    which = (plugin, processes, order)
    whole, case = name_of(which), name_of(which, moment)
    check_same(folder / case, ended[case], folder / whole, ended[whole])


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_every_layout_trains_on_the_same_rows(grid, order):
    ended = grid[1]
    rows = [ended[name_of((plugin, n, order))].rows for plugin, n in product(PLUGINS, PROCESSES)]
    assert rows[0] == rows[1] == rows[2] == rows[3] and len(rows[0]) == STEPS
