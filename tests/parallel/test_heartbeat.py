"""Ranks that freeze, die, wait for each other, or work alone for longer than the time-out."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from coati.utils import liveness
from tests.distributed.ended import run_until_ended

TIMEOUT_S = 3.0
LATE_S = 3.0  # what a loaded machine may add
CASES = "tests.parallel.test_heartbeat"


# In the workers.


def in_group(folder: Path, work) -> None:
    """``work(rank)`` in a group, with the ends of a program."""
    from coati.parallel.launch import explained, launch, shut_down
    from coati.utils.errors import RunFailed

    launch(timeout_s=TIMEOUT_S)
    rank = int(os.environ["RANK"])
    liveness.note(step=7, saved=5)
    try:
        work(folder, rank)
        shut_down(wait=True)
    except RuntimeError as error:
        reason = explained(error)
        if not isinstance(reason, RunFailed):
            raise
        print(f"[rank {rank}] {reason}", flush=True)
        sys.exit(1)


def reduce_for_ever(folder: Path, rank: int) -> None:
    import torch
    import torch.distributed as dist

    dist.all_reduce(torch.ones(1))
    (folder / f"ready-{rank}").touch()
    while True:
        dist.all_reduce(torch.ones(1))
        time.sleep(0.01)


def different_ways(folder: Path, rank: int) -> None:
    import torch
    import torch.distributed as dist

    dist.barrier()
    (folder / f"ready-{rank}").touch()
    if rank == 0:
        dist.all_reduce(torch.ones(1))
    else:
        dist.recv(torch.ones(1), src=0)


def work_alone(folder: Path, rank: int) -> None:
    import torch
    import torch.distributed as dist

    if rank == 0:
        end = time.monotonic() + 3 * TIMEOUT_S
        while time.monotonic() < end:
            sum(range(10**6))  # holds the interpreter's lock
            time.sleep(0.3)
    dist.all_reduce(torch.ones(1))
    if rank == 1:  # after the last collective, too
        time.sleep(2 * TIMEOUT_S)


def call(folder: Path, work: str) -> None:
    in_group(folder, globals()[work])


# The tests.


def run(folder: Path, work: str, fault=None, ready: int | None = 2, timeout: float = 40):
    return run_until_ended(
        folder, 2, f"{CASES}:call", work, fault=fault, ready=ready, timeout=timeout
    )


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_rank_is_named_within_the_timeout(tmp_path, frozen):
    def freeze(pids):
        os.kill(pids[frozen], signal.SIGSTOP)

    found = run(tmp_path, "reduce_for_ever", freeze, timeout=TIMEOUT_S + LATE_S)
    other = found[1 - frozen]
    assert found[frozen].code is None
    assert other.code == 1
    assert TIMEOUT_S / 2 < other.seconds < TIMEOUT_S + LATE_S
    line = last_line(other.text)
    assert line.startswith(f"[rank {1 - frozen}] rank {frozen} on ")
    assert "has not been heard of for" in line and "last step 7" in line
    assert line.endswith("--checkpoint_path auto goes on from step 5")
    assert "Traceback" not in other.text


def test_one_that_goes_on_in_time_ends_nobody(tmp_path):
    def freeze_a_while(pids):
        os.kill(pids[1], signal.SIGSTOP)
        time.sleep(TIMEOUT_S / 3)
        os.kill(pids[1], signal.SIGCONT)
        time.sleep(TIMEOUT_S)
        for pid in pids:
            os.kill(pid, 0)  # both are there
        os.kill(pids[1], signal.SIGKILL)

    first, second = run(tmp_path, "reduce_for_ever", freeze_a_while)
    assert second.code == -signal.SIGKILL and first.code == 1
    assert "rank 1 on " in last_line(first.text) and "has ended" in last_line(first.text)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_is_one_sentence(tmp_path, killed):
    found = run(tmp_path, "reduce_for_ever", lambda pids: os.kill(pids[killed], signal.SIGKILL))
    other = found[1 - killed]
    assert (found[killed].code, other.code) == (-signal.SIGKILL, 1)
    assert other.seconds < TIMEOUT_S + LATE_S
    line = last_line(other.text)
    assert line.startswith(f"[rank {1 - killed}] rank {killed} on ") and " has ended" in line
    assert "Traceback" not in other.text and "gloo" not in other.text


def test_ranks_that_wait_for_each_other_are_told_where(tmp_path):
    found = run(tmp_path, "different_ways", timeout=3 * TIMEOUT_S)
    for rank, one in enumerate(found):
        assert one.code == 1
        line = last_line(one.text)
        assert line.startswith(f"[rank {rank}] all ranks have waited for each other")
        assert line.count("test_heartbeat.py:") == 2  # two places


def test_work_of_one_rank_is_waited_for(tmp_path):
    """Three time-outs on rank 0, which the other awaits in a collective, then two on rank 1, when
    rank 0 has nothing left to do."""
    found = run(tmp_path, "work_alone", ready=None, timeout=12 * TIMEOUT_S)
    assert [one.code for one in found] == [0, 0], [one.text for one in found]


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith("[rank ")]
    assert len(lines) == 1, text
    return lines[0]
