"""The commands of demo_preferences.sh and prove_preferences.sh, with a stand-in for Python that
writes them down."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from coati.cli.score import parse_score
from tests.cli.flat import parse_dpo, parse_rm

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"
PYTHON = """#!{python}
import json, pathlib, sys
words = sys.argv[1:]
with open({calls!r}, "a") as file:
    file.write(json.dumps(words) + "\\n")
if words[0] == "-c":
    print(2)
elif words[0].endswith("smollm2.py"):
    print("models/smollm2")
elif words[0].endswith("prepare_dataset.py"):
    pathlib.Path(words[words.index("--data_arrow_output_dir") + 1]).mkdir(parents=True)
"""


def called_by(script: str, folder: Path, **changes: str) -> dict[str, list[str]]:
    """The words that ``script`` called each program with, the last time that it did."""
    (folder / "bin").mkdir()
    stand_in, calls = folder / "bin" / "python", folder / "calls"
    stand_in.write_text(PYTHON.format(python=sys.executable, calls=str(calls)))
    stand_in.chmod(0o755)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "DEMO_DIR": str(folder / "demo"), **changes}
    subprocess.run(
        ["bash", DEMO / script], env=environment, check=True, capture_output=True, timeout=60
    )
    return {
        Path(words[0]).name: words[1:] for words in map(json.loads, calls.read_text().splitlines())
    }


@pytest.mark.parametrize("changes, steps", [({}, 64), ({"RM_STEPS": "3"}, 3)])
def test_the_training_scripts_take_its_flags(tmp_path, changes, steps):
    called = called_by("demo_preferences.sh", tmp_path, **changes)
    reward_model, policy = parse_rm(called["train_rm.py"]), parse_dpo(called["train_dpo.py"])
    assert (reward_model.max_steps, reward_model.eval_interval) == (steps, 0)
    assert (
        policy.lora_rank
        and policy.eval_dataset == reward_model.eval_dataset != reward_model.dataset
    )
    assert called["result.py"] == [f"{tmp_path}/demo/dpo/metrics.jsonl", "dpo"]


def test_the_proof_scores_pairs_that_training_and_its_curve_do_not_use(tmp_path):
    called = called_by("prove_preferences.sh", tmp_path)
    trained, scored = parse_rm(called["train_rm.py"]), parse_score(called["score.py"])
    assert trained.max_steps == 216 and trained.dataset != trained.eval_dataset
    assert scored.input == ["examples/data/preference_test.jsonl"]
    assert called["result.py"] == [
        f"{tmp_path}/demo/scores.jsonl",
        "pairs",
        "--reward_accuracy",
        "0.75",
    ]


def messages(name: str) -> set[str]:
    rows = map(json.loads, (DEMO.parent / "data" / name).read_text(encoding="utf-8").splitlines())
    parts = (part for row in rows for part in (*row["context"], *row["chosen"], *row["rejected"]))
    return {" ".join(part["content"].lower().split()) for part in parts}


def test_no_message_of_the_tested_pairs_was_trained_on():
    tested, held_out = messages("preference_test.jsonl"), messages("preference_eval.jsonl")
    trained = messages("preference.jsonl") | messages("preference_more.jsonl")
    assert len(tested) > 600 and not tested & trained and not held_out & trained
