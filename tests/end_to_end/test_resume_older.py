"""Prepared data and checkpoints of release 0.1.0 load, and a run goes on from them exactly.

tests/data/sft_runs_0.1.0.tar.gz was written by that release's train_sft.py, 8 steps with plugins
ddp and zero2 (the flags below): the model and the prepared rows that it started from, its
checkpoint after step 3, in the middle of an interval of metrics, and the metrics of the whole run.
"""

import tarfile
from pathlib import Path

import pytest

from tests.distributed.spawn import run
from tests.end_to_end.inputs import metrics
from tests.end_to_end.worker import Run

RUNS = Path(__file__).parents[1] / "data" / "sft_runs_0.1.0.tar.gz"
FLAGS = """--mixed_precision fp32 --max_epochs 2 --lr 1e-2 --batch_size 2 --accumulation_steps 2
    --max_length 96 --log_interval 2 --save_interval 3 --max_steps 8 --warmup_steps 2"""


@pytest.mark.parametrize("plugin", ["ddp", "zero2"])
def test_a_run_of_an_older_release_goes_on(plugin, tmp_path):
    with tarfile.open(RUNS) as archive:
        archive.extractall(tmp_path, filter="data")
    checkpoint = tmp_path / plugin / "epoch-0_step-3"
    whole = metrics(tmp_path / plugin)
    words = [
        *("--pretrain", str(tmp_path / "model"), "--dataset", str(tmp_path / "arrow")),
        *("--plugin", plugin, *FLAGS.split(), "--save_path", str(tmp_path / "resumed")),
        *("--checkpoint_path", str(checkpoint)),
    ]
    ended = run(1, "tests.end_to_end.worker:train", Run(words), timeout=120)[0]
    assert ended.code == 0 and "starts over" not in ended.err
    resumed = metrics(tmp_path / "resumed")
    assert [line["step"] for line in resumed] == [4, 6, 8]
    for line, expected in zip(resumed, whole[1:], strict=True):
        assert line.keys() == expected.keys()
        # Another kind of CPU adds in another order.
        assert line == pytest.approx(expected, rel=1e-5)
