"""Freed memory stays with the process: the large tensors of a step are not mapped and zeroed anew
in the next. Weights lie where products round alike, whatever file they come from."""

import os
import subprocess
import sys

import pytest
import torch

PROBE = """
import resource, sys
import torch
from coati.parallel.compat.cpu.malloc import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(16_000_000).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print([faults_of_a_step() for _ in range(20)][-1])
"""


def page_faults(mode: str, **variables: str) -> int:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")
    } | variables
    command = [sys.executable, "-c", PROBE, mode]
    return int(
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    )


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_after_some_steps_no_new_page_is_touched():
    """64 MB are some 15,600 pages of 4 KiB; glibc by itself keeps blocks of up to 32 MB once they
    were freed."""
    assert page_faults("leave") > 50  # some kernels map 2 MiB at once
    assert page_faults("keep") <= 10


def test_settings_of_the_environment_are_left_alone(monkeypatch):
    from coati.parallel.compat.cpu.malloc import keep_freed_memory

    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert keep_freed_memory() is False


def test_weights_lie_aligned_whatever_the_header_of_their_file(tmp_path):
    from torch import nn

    from coati.parallel.compat.cpu.malloc import ALIGNMENT, align_weights

    layer = nn.Linear(8, 8, bias=False)
    odd = torch.arange(65.0)[1:].view(8, 8)
    layer.weight.data = odd
    assert layer.weight.data_ptr() % ALIGNMENT == 4
    layer.also = layer.weight  # a tied one stays tied
    align_weights(layer)
    assert layer.weight.data_ptr() % ALIGNMENT == 0 and torch.equal(layer.weight, odd)
    assert layer.also is layer.weight
    place = layer.weight.data_ptr()
    align_weights(layer)
    assert layer.weight.data_ptr() == place
