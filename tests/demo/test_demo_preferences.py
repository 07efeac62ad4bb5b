"""The commands of demo_preferences.sh, with a stand-in for Python that writes them down."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from coati.cli.preferences import parse_dpo, parse_rm

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "demo" / "demo_preferences.sh"
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


@pytest.mark.parametrize("interval, steps", [(None, 64), ("30", 255)])
def test_the_training_scripts_take_its_flags(tmp_path, interval, steps):
    (tmp_path / "bin").mkdir()
    stand_in, calls = tmp_path / "bin" / "python", tmp_path / "calls"
    stand_in.write_text(PYTHON.format(python=sys.executable, calls=str(calls)))
    stand_in.chmod(0o755)
    chosen = {"EVAL_INTERVAL": interval, "RM_STEPS": "255", "RM_ACCURACY": "0.75"} if interval else {}
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "DEMO_DIR": str(tmp_path / "demo"), **chosen}
    subprocess.run(["bash", SCRIPT], env=environment, check=True, capture_output=True, timeout=60)
    called = {Path(words[0]).name: words[1:] for words in map(json.loads, calls.read_text().splitlines())}
    reward_model, policy = parse_rm(called["train_rm.py"]), parse_dpo(called["train_dpo.py"])
    assert (reward_model.max_steps, reward_model.eval_interval) == (steps, int(interval) if interval else None)
    assert policy.lora_rank and policy.eval_dataset == reward_model.eval_dataset != reward_model.dataset
    assert called["result.py"] == [f"{tmp_path}/demo/dpo/metrics.jsonl", "dpo"]
