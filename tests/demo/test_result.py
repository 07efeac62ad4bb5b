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
    text, wrong = result.summary(ENTRIES)
    assert wrong is None
    assert text.splitlines() == [
        "Loss on held-out rows: 3.500 before, 2.750 after 3 steps",
        "Speed: 100 tokens/s in the median step",
        "Peak memory: 1000 MiB (process 0), 2000 MiB (process 1)",
    ]


def test_a_loss_that_did_not_fall_is_a_failure(result, tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(
        "".join(json.dumps(entry) + "\n" for entry in [*ENTRIES, {"step": 4, "eval/loss": 3.6}])
    )
    done = subprocess.run(
        [sys.executable, DEMO / "result.py", file], capture_output=True, text=True
    )
    assert (
        done.returncode == 1
        and "has not fallen" in done.stderr
        and "3.600 after 4 steps" in done.stdout
    )
    with pytest.raises(ValueError, match="found 1"):
        result.summary(ENTRIES[:1])


def evaluations(before: dict, after: dict) -> list[dict]:
    bounds = {"low": -0.08, "high": 0.07}
    entries = []
    for step, values in ((0, before), (9, after)):
        entry = {"step": step, "eval/loss": 0.7, "eval/count": 140.0}
        for name, value in values.items():
            entry[f"eval/{name}"] = value
            if name.startswith("acc"):
                entry |= {f"eval/{name}_{end}": value + by for end, by in bounds.items()}
        entries.append(entry)
    return entries


@pytest.mark.parametrize(
    "accuracy, wrong", [(0.7, None), (0.67, None), (0.66, "the accuracy is below 0.67")]
)
def test_a_reward_model_must_rank_unseen_pairs(result, accuracy, wrong):
    text, found = result.summary(evaluations({"acc": 0.5}, {"acc": accuracy}), "rm")
    assert found == wrong
    assert text.startswith(
        "Accuracy on 140 held-out pairs: 0.500 (95% 0.420 to 0.570) before, "
        f"{accuracy:.3f} (95% {accuracy - 0.08:.3f} to {accuracy + 0.07:.3f}) after 9 steps"
    )


@pytest.mark.parametrize(
    "accuracy, chosen, wrong",
    [
        (0.65, -51.0, None),
        (0.57, -51.0, "beyond chance"),
        (0.65, -53.0, "less likely"),
        (0.65, -40.0, None),
    ],
)
def test_dpo_must_rank_better_and_keep_the_chosen_responses(result, accuracy, chosen, wrong):
    before = {"accuracy": 0.5, "lp_chosen": -50.0, "lp_rejected": -52.0, "margin": 0.0}
    after = {"accuracy": accuracy, "lp_chosen": chosen, "lp_rejected": -55.0, "margin": 0.3}
    text, found = result.summary(evaluations(before, after), "dpo")
    assert found is None if wrong is None else wrong in found
    assert f"Log-probability of chosen responses: -50.00 before, {chosen:.2f} after" in text
    assert "Margin of the implicit rewards: 0.000 before, 0.300 after" in text


@pytest.mark.parametrize("right, wrong", [(3, True), (4, False)])
def test_scored_pairs_must_be_right_more_often_than_the_bound(result, right, wrong):
    rows = [{"chosen": float(i < right), "rejected": 0.5} for i in range(4)]
    lines, said = result.pairs(rows, 0.75)
    assert lines[0].startswith(f"Accuracy on 4 test pairs: {right / 4:.3f} (95%")
    assert (said is not None) == wrong


@pytest.mark.parametrize("script", ["demo.sh", "demo_preferences.sh"])
def test_a_directory_that_is_there_is_never_emptied(tmp_path, script):
    (tmp_path / "mine.txt").write_text("mine")
    environment = {**os.environ, "DEMO_DIR": str(tmp_path)}
    done = subprocess.run(
        ["bash", DEMO / script], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and f"{script}: DEMO_DIR={tmp_path} exists" in done.stderr
    assert (tmp_path / "mine.txt").read_text() == "mine"
