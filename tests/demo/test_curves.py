"""The plot at the end of a demonstration."""

import json
import subprocess
import sys
from pathlib import Path

CURVES = Path(__file__).resolve().parents[2] / "examples" / "demo" / "curves.py"


def test_named_metrics_become_a_png_with_a_panel_each(tmp_path):
    from PIL import Image

    entries = [{"train/reward": 1.0, "eval/acc": 0.5}, {"train/reward": 2.0}, {"step": 3}]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    for names, png in ((["eval/acc"], "one.png"), (["eval/acc", "train/reward"], "two.png")):
        command = [sys.executable, CURVES, metrics, *names, "--png", tmp_path / png]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert str(tmp_path / png) in done.stdout
    one, two = (Image.open(tmp_path / png).size for png in ("one.png", "two.png"))
    assert two == (2 * one[0], one[1])
