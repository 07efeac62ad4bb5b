"""Joining other processes, and what is said when that cannot work."""

import random

import numpy as np
import pytest
import torch

from coati.parallel import launch as module
from coati.parallel.launch import LaunchFailed, launch, set_seed, warn_of_threads
from tests.distributed.spawn import run


def group() -> tuple:
    """In a worker: the group that launch makes, and one sum over it."""
    import torch.distributed as dist

    device = launch(seed=5)
    total = torch.ones(3)
    dist.all_reduce(total)
    drawn = torch.rand(1).item(), random.random(), np.random.rand()
    launch(seed=5)  # a second time, as a notebook's second cell
    return dist.get_rank(), dist.get_world_size(), str(device), total.tolist(), drawn


CPU = {"CUDA_VISIBLE_DEVICES": ""}


def test_ranks_meet_and_draw_the_same_numbers():
    first, second = run(2, "tests.parallel.test_launch:group", env=CPU)
    assert first[:4] == (0, 2, "cpu", [2.0, 2.0, 2.0]) and second[:4] == (
        1,
        2,
        "cpu",
        [2.0, 2.0, 2.0],
    )
    assert first[4] == second[4]


def alone() -> tuple:
    """In a worker: without a launcher's variables."""
    import os

    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    return group()


def test_a_process_without_a_launcher_is_a_group_of_one():
    assert run(1, "tests.parallel.test_launch:alone", env=CPU)[0][:4] == (
        0,
        1,
        "cpu",
        [1.0, 1.0, 1.0],
    )


def test_missing_variables_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        LaunchFailed,
        match="RANK is set but MASTER_ADDR, MASTER_PORT not: start with colossalai run",
    ):
        launch()


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(
        LaunchFailed, match="LOCAL_RANK 1 needs 2 GPUs, this host shows 1; lower --nproc_per_node"
    ):
        launch()


def test_a_seed_decides_every_generator():
    def draw() -> tuple:
        set_seed(2**40 + 3)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw() == draw()


@pytest.mark.parametrize(
    "processes, threads, said", [("2", 2, True), ("2", 1, False), ("1", 2, False), ("3", 1, False)]
)
def test_too_many_threads_are_said(monkeypatch, capsys, processes, threads, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    monkeypatch.delenv("RANK", raising=False)
    warn_of_threads()
    text = capsys.readouterr().err
    assert ("set OMP_NUM_THREADS=1" in text) == said


def test_processes_made_by_fork_leave_a_ddp_group():
    for _ in range(3):
        assert run(2, "tests.parallel.leave_cases:leave_after_a_step", timeout=60) == [True, True]
