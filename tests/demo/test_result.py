"""What the demo prints at its end."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"
ENTRIES = [
    {"step": 0, "eval/loss": 3.5},
    {"step": 1, "train/loss": 3.4, "train/tokens_per_second": 90.0},
    {"step": 2, "train/loss": 3.0, "train/tokens_per_second": 110.0},
    {"step": 3, "train/loss": 3.0, "train/tokens_per_second": 100.0},
    {"step": 3, "eval/loss": 2.75},
    {"step": 3, "memory/rank_0_peak_mb": 1000.0, "memory/rank_1_peak_mb": 2000.0},
]


@pytest.fixture
def result():
    spec = importlib.util.spec_from_file_location("demo_result", DEMO / "result.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_loss_speed_and_memory(result):
    text, fell = result.summary(ENTRIES)
    assert fell
    assert text.splitlines() == [
        "Evaluation loss on rows not trained on: 3.500 before, 2.750 after 3 steps",
        "Speed: 100 tokens/s",
        "Peak memory: 1.05 GB (process 0), 2.10 GB (process 1)",  # MiB in the file, GB on the screen
    ]


def test_a_loss_that_did_not_fall_is_a_failure(result, tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in [*ENTRIES, {"step": 4, "eval/loss": 3.6}]))
    done = subprocess.run([sys.executable, DEMO / "result.py", file], capture_output=True, text=True)
    assert done.returncode == 1 and "has not fallen" in done.stderr and "3.600 after 4 steps" in done.stdout
    with pytest.raises(ValueError, match="found 1"):
        result.summary(ENTRIES[:1])


def test_a_directory_that_is_there_is_never_emptied(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    environment = {**os.environ, "DEMO_DIR": str(tmp_path)}
    done = subprocess.run(["bash", DEMO / "demo.sh"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and f"DEMO_DIR={tmp_path} exists" in done.stderr
    assert (tmp_path / "mine.txt").read_text() == "mine"
