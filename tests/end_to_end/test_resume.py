"""N steps = k steps + kill -9 at any moment + resume + the rest, to the bit; polite ends, full
disks, other layouts.

Runs that are not killed share a launch; what they wrote is resumed in fresh processes.
"""

import random
from pathlib import Path

import numpy as np
import pytest

from coati.dataset.load.epoch_order import epoch_order
from coati.dataset.load.loader import GlobalBatchLoader
from coati.parallel.checkpoint import checkpoints, read_checkpoint
from tests.distributed.spawn import WorkerFailed, run
from tests.end_to_end.inputs import metrics, weights
from tests.end_to_end.worker import Fault, Run

CPU = {"CUDA_VISIBLE_DEVICES": ""}
KEPT, STEPS, FILES = (
    2,
    12,
    8,
)  # checkpoints kept; steps of a run; files that rank 0 writes in a save
SHORT = ("--keep_last_k", "1", "--max_steps", "5")  # two saves, and the final one
LORA = ["--lora_rank", "4"]  # with its dropout of 0.1, so that the random state matters


@pytest.fixture(scope="module")
def words(model, data):
    """``words(save_dir, more...)``: two steps a checkpoint, three an evaluation, two a line of
    metrics; 3 an epoch."""

    def words(save_dir, *more: str, batch: tuple[int, int] = (2, 2)) -> list[str]:
        return [
            "--pretrain",
            model,
            "--dataset",
            data["train"],
            "--eval_dataset",
            data["eval"],
            "--plugin",
            "zero2",
            "--mixed_precision",
            "fp32",
            "--max_epochs",
            "4",
            "--lr",
            "1e-3",
            "--batch_size",
            str(batch[0]),
            "--accumulation_steps",
            str(batch[1]),
            "--max_length",
            "96",
            "--log_interval",
            "2",
            "--eval_interval",
            "3",
            "--save_interval",
            "2",
            "--keep_last_k",
            str(KEPT),
            "--save_dir",
            str(save_dir),
            *more,
        ]

    return words


AUTO = ("--checkpoint_path", "auto")


def started(folder: Path, words) -> dict[str, Run]:
    """The runs of the first launch, by name, each with a directory of its own."""
    full = {
        f"full_{rank}": Fault("file", count, what="full", rank=rank)
        for rank, count in ((0, FILES + 3), (1, 2))
    }
    return {
        "plain": Run(words(folder / "plain")),
        "lora": Run(words(folder / "lora", *LORA)),
        "term": Run(words(folder / "term", *AUTO), Fault("step", 4, "after", what="term", rank=1)),
        **{name: Run(words(folder / name), fault) for name, fault in full.items()},
        "copies": Run(words(folder / "copied", *SHORT), copies=str(folder / "copies")),
        "fewer": Run(words(folder / "fewer"), Fault("step", 4, "after", what="term")),
        "batch_4": Run(words(folder / "batch_4", batch=(4, 1))),
    }


@pytest.fixture(scope="module")
def first(tmp_path_factory, words):
    """What the runs of :func:`started` did: (their folder, {name: [Ended of rank 0, of rank
    1]})."""
    folder = tmp_path_factory.mktemp("runs")
    ranks = run(
        2, "tests.end_to_end.worker:train_each", started(folder, words), env=CPU, timeout=400
    )
    return folder, {name: [rank[name] for rank in ranks] for name in ranks[0]}


@pytest.fixture(scope="module")
def second(first, words):
    """In fresh processes: each of the interrupted runs gone on with, and each copy of a directory
    in mid-save."""
    folder, _ = first
    names = {name: folder / name for name in ("term", "full_0", "full_1")}
    names |= {copy.name: copy for copy in sorted((folder / "copies").iterdir())}
    runs = {
        name: Run(words(place, *(SHORT if place.parent.name == "copies" else ()), *AUTO))
        for name, place in names.items()
    }
    ranks = run(2, "tests.end_to_end.worker:train_each", runs, env=CPU, timeout=500)
    return folder, {name: [rank[name] for rank in ranks] for name in ranks[0]}


def assert_same_run(place: Path, reference: Path) -> None:
    assert metrics(place) == metrics(reference), place
    assert weights(place) == weights(reference) and weights(place), place


def names(save_dir: Path) -> list[str]:
    return [path.name for path in checkpoints(save_dir)]


def leftovers(save_dir: Path) -> list[str]:
    return [path.name for path in save_dir.glob(".*")]


def test_an_uninterrupted_run_keeps_its_last_checkpoints_and_says_where_the_model_is(first):
    folder, ended = first
    assert [rank.code for rank in ended["plain"]] == [0, 0]
    assert names(folder / "plain") == ["epoch-3_step-10", "epoch-3_step-12"] and not leftovers(
        folder / "plain"
    )
    assert [line["step"] for line in metrics(folder / "plain") if "train/loss" in line] == [
        2,
        4,
        6,
        8,
        10,
        12,
    ]
    assert [line["step"] for line in metrics(folder / "plain") if "eval/loss" in line] == [
        0,
        3,
        6,
        9,
        12,
    ]
    assert (
        "the trained model is in" in ended["plain"][0].err
        and "peak memory" in ended["plain"][0].err
    )


def killed(words: list[str], fault: Fault) -> None:
    """A run that ``fault`` kills; anything else that ends it is an error."""
    with pytest.raises(WorkerFailed, match=rf"--- rank {fault.rank} \(exit code -9\) ---"):
        run(2, "tests.end_to_end.worker:train", Run(words, fault), env=CPU, timeout=200)


def drawn(generator: random.Random) -> Fault:
    """A moment that comes before the third checkpoint after the start, so that five of them fit
    into one run."""
    rank, at = generator.randrange(2), generator.choice(["update", "step", "file", "rename"])
    moment = generator.choice(["before", "half", "after"] if at == "file" else ["before", "after"])
    if at == "rename":
        return Fault(at, 1, moment, rank=0)
    most = 3 if at != "file" else 2 * FILES if rank == 0 else 2
    return Fault(at, generator.randint(1, most), moment, rank=rank)


@pytest.mark.parametrize("name, kills, more, last", [("plain", 5, [], 8), ("lora", 2, LORA, 4)])
def test_killed_again_and_again_the_run_is_the_uninterrupted_one(
    first, words, tmp_path, name, kills, more, last
):
    folder, _ = first
    generator = random.Random(
        215
    )  # kills of every kind on both ranks, most of them after another checkpoint
    for fault in [drawn(generator) for _ in range(kills)]:
        killed(words(tmp_path, *more, *AUTO), fault)
        for checkpoint in checkpoints(tmp_path):
            read_checkpoint(checkpoint)
    ended = run(
        2, "tests.end_to_end.worker:train", Run(words(tmp_path, *more, *AUTO)), env=CPU, timeout=200
    )
    assert [rank.code for rank in ended] == [0, 0]
    assert len(ended[0].rows) == STEPS - last and f"_step-{last}\n" in ended[0].err
    assert_same_run(tmp_path, folder / name)
    assert names(tmp_path) == names(folder / name) and not leftovers(tmp_path)


def test_at_every_moment_of_a_save_the_disk_holds_a_run_that_goes_on(first, second):
    folder, ended = second
    copies = [name for name in ended if (folder / "copies" / name).is_dir()]
    moments = {tuple(name.split()[3:]) for name in copies}
    for file in (
        "model.safetensors",
        "config.json",
        "rank-00000.pt",
        "rank-00001.pt",
        "running_states.json",
    ):
        assert {moment[0] for moment in moments if moment[-1] == file} == {
            "before",
            "half",
            "after",
        }, file
    assert {"before", "after"} == {
        moment[0] for moment in moments if moment[-1] == "epoch-1_step-4"
    }
    for name in copies:
        assert [rank.code for rank in ended[name]] == [0, 0], name
        assert_same_run(folder / "copies" / name, folder / "copied")
        assert not leftovers(folder / "copies" / name), name


@pytest.mark.slow
def test_killed_at_every_moment_of_a_save(first, words, tmp_path):
    """The same with real kills, in one run: each takes the run to its next save."""
    points = [Fault("file", n, m) for n in range(1, FILES + 1) for m in ("before", "half", "after")]
    points += [Fault("file", 1, m, rank=1) for m in ("before", "half", "after")]
    points += [Fault("rename", 1, "before"), Fault("rename", 1, "after")]
    for fault in points:
        killed(words(tmp_path, *AUTO), fault)
    run(2, "tests.end_to_end.worker:train", Run(words(tmp_path, *AUTO)), env=CPU, timeout=200)
    assert_same_run(tmp_path, first[0] / "plain")


def test_sigterm_on_one_rank_ends_all_politely(first, second):
    folder, ended = first
    assert [rank.code for rank in ended["term"]] == [0, 0]
    said = next(line for line in ended["term"][0].err.splitlines() if "To go on" in line)
    assert (
        "stopped after step 5, everything is saved" in said
        and said.count("--checkpoint_path auto") == 1
    )
    assert said.endswith("--checkpoint_path auto") and "auto --checkpoint_path" not in said
    assert len(ended["term"][0].rows) == 5
    assert_same_run(folder / "term", folder / "plain")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_on_one_rank_stops_all_and_the_run_goes_on_later(first, second, rank):
    folder, ended = first
    for each in ended[f"full_{rank}"]:
        assert each.code == 1
        assert (
            "could not save" in each.err
            and "epoch-1_step-4" in each.err
            and "Traceback" not in each.err
        )
        assert f"(rank {rank}: " in each.err
        assert "OSError: [Errno 28] No space left on device" in each.err
        assert "--checkpoint_path auto" in each.err
    assert len(ended[f"full_{rank}"][0].rows) == 4
    assert (
        "epoch-0_step-2" in second[1][f"full_{rank}"][0].err
    )  # what it went on from: the earlier one, whole
    assert_same_run(folder / f"full_{rank}", folder / "plain")


@pytest.fixture(scope="module")
def alone(first, words):
    """One process: the run of two processes gone on with under another plugin; two ways to cut a
    window of 8."""
    folder, _ = first
    fewer = Run(words(folder / "fewer", "--plugin", "ddp", *AUTO))
    cuts = {
        f"batch_{size}": Run(words(folder / f"batch_{size}", batch=(size, 8 // size)))
        for size in (8, 1)
    }
    launches = [{"fewer": fewer}, cuts]  # different plugins never share a process
    ended = [
        run(1, "tests.end_to_end.worker:train_each", runs, env=CPU, timeout=300)[0]
        for runs in launches
    ]
    return ended[0] | ended[1]


def test_with_other_processes_and_plugin_the_run_goes_on_in_the_same_order(first, alone):
    folder, ended = first
    before, after = ended["fewer"][0].rows, alone["fewer"].rows
    said = alone["fewer"].err
    assert "SIGTERM: finishing this step, then saving" in ended["fewer"][0].err
    assert alone["fewer"].code == 0 and "the optimizer state starts over" in said.replace("\n", " ")
    assert "world_size 2 -> 1" in said and "plugin zero2 -> ddp" in said
    epoch = [row for window in ended["plain"][0].rows[3:6] for row in window]
    # Two windows of 8 rows of the second epoch were seen by two processes, windows of 4 follow.
    assert [row for window in [*before[3:], *after[:3]] for row in window][: len(epoch)] == epoch
    rows = 31
    assert len(after) == (rows - 16) // 4 + 2 * (rows // 4) and {
        len(window) for window in after
    } == {4}
    assert metrics(folder / "fewer")[-1]["step"] == 5 + len(after)


def test_the_cut_of_a_window_changes_nothing(first, alone):
    folder, _ = first
    runs = [metrics(folder / name) for name in ("batch_8", "batch_1", "batch_4")]
    assert all(each.code == 0 for each in alone.values()) and len(runs[0]) == STEPS // 2 + 5
    for lines in zip(*runs, strict=True):
        for name in lines[0]:
            values = [line[name] for line in lines]
            assert max(values) - min(values) <= 1e-5 * abs(values[0]), (name, values)


GRID = [
    (rows, batch, accumulation, size)
    for rows in (24, 31, 97)
    for batch, accumulation in ((1, 1), (1, 4), (2, 2), (4, 1), (3, 2))
    for size in (1, 2, 4)
]


@pytest.mark.parametrize("rows, batch, accumulation, size", GRID)
def test_sample_order(rows, batch, accumulation, size):
    """Each row at most once an epoch; from any stop the rest follows; ranks share the windows that
    one would have."""
    data = Rows(rows)
    window = batch * accumulation * size

    def loader(
        rank: int = 0, size: int = size, accumulation: int = accumulation
    ) -> GlobalBatchLoader:
        shares = {
            "batch_size": batch,
            "accumulation_steps": accumulation,
            "dp_rank": rank,
            "dp_size": size,
        }
        return GlobalBatchLoader(
            data, collate=lambda found: [row["index"] for row in found], **shares
        )

    def flat(windows) -> list[int]:
        return [row for batches in windows for rows_of_batch in batches for row in rows_of_batch]

    for epoch in (0, 1, 5):
        seen = flat(loader(size=1, accumulation=accumulation * size).global_batches(epoch))
        assert len(seen) == len(set(seen)) == rows // window * window
        ranks = [list(loader(rank).global_batches(epoch)) for rank in range(size)]
        together = [
            [row for step in zip(*steps, strict=True) for share in step for row in share]
            for steps in zip(*ranks, strict=True)
        ]
        assert [row for rows_of_window in together for row in rows_of_window] == seen
        for stop in {0, 1, len(loader()) // 2, len(loader())}:
            assert flat(loader().global_batches(epoch, stop * window)) == flat(ranks[0][stop:])
            expected = seen[stop * window : (stop + 1) * window]
            assert loader().rows_at(epoch, stop * window)[: len(expected)] == expected


class Rows:
    """A data set of rows of several lengths."""

    column_names = ("index", "seq_length")

    def __init__(self, count: int) -> None:
        self.lengths = np.random.default_rng(0).integers(5, 60, count)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, key):
        return list(self.lengths) if key == "seq_length" else {"index": key}


def test_every_epoch_has_an_order_of_its_own_that_the_seed_decides():
    lengths = Rows(500).lengths
    orders = [epoch_order(lengths, seed, epoch).tolist() for seed in (1, 2) for epoch in range(4)]
    assert all(sorted(order) == list(range(500)) for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders)
    assert epoch_order(lengths, 1, 3).tolist() == orders[3]
    assert epoch_order(lengths, 1, 3, shuffle=False).tolist() == list(range(500))
