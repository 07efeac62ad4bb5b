"""benchmarks/bench_dpo_7b.py runs through where there is no GPU, and says what it is without
one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def bench(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_dpo_7b.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=280)


def test_without_a_gpu_it_says_what_it_needs():
    done = bench()
    assert done.returncode == 1 and "needs an NVIDIA GPU" in done.stderr and "--tiny" in done.stderr


@pytest.mark.matrix
def test_a_tiny_model_goes_through_it(tmp_path):
    done = bench(
        "--tiny", "--batch_size", "2", "--steps", "2", "--output", str(tmp_path / "found.json")
    )
    assert done.returncode == 0, done.stderr
    assert "these figures mean nothing" in done.stdout and "first loss 0.69" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["tiny"] and found["device"] == "CPU" and found["plugin"] == "zero2_cpu"
    # Two pairs of rows of 64 tokens; a policy that is its reference has a loss of ln 2.
    assert [step["tokens"] for step in found["2"]["steps"]] == [256, 256]
