"""Packs of a mixture of two data sets: resumed to the bit in mid-epoch, the same for any number of
processes."""

import pytest

from tests.distributed.spawn import run
from tests.end_to_end.inputs import metrics, weights
from tests.end_to_end.worker import Fault, Run

CPU = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def words(model, data):
    def words(save_dir, *more: str, batch: int = 1) -> list[str]:
        return [
            "--pretrain",
            model,
            "--dataset",
            data["train"],
            data["eval"],
            "--dataset_weights",
            "1",
            "2",
            "--packing",
            "--max_length",
            "240",
            "--plugin",
            "zero2",
            "--mixed_precision",
            "fp32",
            "--max_epochs",
            "4",
            "--batch_size",
            str(batch),
            "--accumulation_steps",
            "2",
            "--save_interval",
            "0",
            "--log_interval",
            "2",
            "--lr",
            "1e-3",
            "--save_dir",
            str(save_dir),
            *more,
        ]

    return words


@pytest.fixture(scope="module")
def runs(tmp_path_factory, words):
    """Two processes: to the end, and stopped after the third step, which is in the second epoch,
    then gone on with; one process with batches twice as large."""
    folder = tmp_path_factory.mktemp("runs")
    stopped = Run(words(folder / "stopped"), Fault("step", 3, "after", what="term", rank=1))
    train = "tests.end_to_end.worker:train_each"
    first = run(2, train, {"whole": Run(words(folder / "whole")), "stopped": stopped}, env=CPU)[0]
    again = Run(words(folder / "stopped", "--checkpoint_path", "auto"))
    refused = Run(
        [
            *words(
                folder / "other",
                "--checkpoint_path",
                str(next((folder / "stopped").glob("epoch-*"))),
            ),
            "--max_length",
            "200",
        ]
    )
    second = run(2, train, {"again": again, "refused": refused}, env=CPU)[0]
    alone = run(1, train, {"alone": Run(words(folder / "alone", batch=2))}, env=CPU)[0]
    return folder, first | second | alone


def test_a_resumed_run_is_the_uninterrupted_one(runs):
    folder, ended = runs
    assert [ended[name].code for name in ("whole", "stopped", "again")] == [0, 0, 0]
    assert (
        4 < len(ended["whole"].rows)
        and ended["again"].rows == ended["whole"].rows[len(ended["stopped"].rows) :]
    )
    assert metrics(folder / "stopped") == metrics(folder / "whole")
    assert weights(folder / "stopped") == weights(folder / "whole")


def test_one_process_trains_on_the_same_packs(runs):
    folder, ended = runs
    assert ended["alone"].rows == ended["whole"].rows
    for mine, theirs in zip(metrics(folder / "alone"), metrics(folder / "whole"), strict=True):
        if "train/loss" in mine:
            assert mine["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-5)
            assert mine["train/supervised_tokens"] == theirs["train/supervised_tokens"]


def test_what_is_said_of_the_packs_and_the_mixture(runs):
    folder, ended = runs
    assert "--packing: " in ended["whole"].err and "packs of up to 240 tokens" in ended["whole"].err
    assert "--dataset_weights: of the " in ended["whole"].err
    first = metrics(folder / "whole")[0]
    assert (
        first["step"] == 0
        and first["packing/rows_per_pack"] > 2
        and 0 <= first["packing/padding"] < 1
    )


def test_other_packs_do_not_go_on_from_there(runs):
    ended = runs[1]["refused"]
    assert ended.code == 1 and "--max_length 240 -> 200: must be the same" in ended.err
