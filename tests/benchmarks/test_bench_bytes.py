"""What an optimizer step sends over gloo is what its method needs."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from benchmarks.bench_bytes import CASES, ROOT


@pytest.mark.slow
@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("ip"), reason="a network of its own needs root, iproute2"
)
@pytest.mark.parametrize("nproc", [2, 3])
def test_a_step_sends_the_least_bytes(tmp_path, nproc):
    output = tmp_path / "bytes.json"
    program = ROOT / "benchmarks" / "bench_bytes.py"
    words = [sys.executable, str(program), "--nproc", str(nproc), "--output", str(output)]
    subprocess.run(words, check=True, timeout=500)
    found = json.loads(output.read_text())
    assert found.keys() == CASES.keys()
    for name, row in found.items():
        assert 0.95 < row["ratio"] < 1.05, name
