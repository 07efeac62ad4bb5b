"""The benchmark of rollout servers on a GPU: what it says where there is none, and its paths on a
CPU."""

import json
import subprocess
import sys

import pytest
import torch

from tests.end_to_end.inputs import ROOT

PROGRAM = ROOT / "benchmarks" / "bench_rollout_gpu.py"


def figures(tmp_path, *words: str) -> dict:
    output = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, PROGRAM, "--output", output, *words],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_every_item_is_named_with_the_reason(tmp_path):
    found = figures(tmp_path)
    assert len(found) == 7
    for item, row in found.items():
        needed = "2 GPUs" if item == "publish_nccl" else "1 GPU"
        assert row == {"skipped": f"needs {needed}, and there are 0"}, item


@pytest.mark.slow
def test_every_way_of_publishing_runs_on_a_cpu(tmp_path):
    found = figures(tmp_path, "--cpu")
    for sync in ("disk", "http", "nccl", "ipc"):
        row = found[f"publish_{sync}"]
        assert row["engine"] == "own" and row["seconds"] > 0 and row["megabytes"] > 0.3
    assert found["rollout_own"]["tokens_per_second"] > 0
    assert found["rollout_vllm"]["skipped"].startswith("no environment with vLLM for a GPU")
    assert found["sleep"] == {"skipped": "vLLM does not sleep on a CPU"}
