"""Leaving a process group whose last collective gloo has not freed yet."""

import subprocess
import sys

# Python's lock is wanted for the tensor, which nothing but the collective holds any more.
PROGRAM = """
import faulthandler
import torch
import torch.distributed as dist
from coati.parallel.leave_groups import leave_groups

faulthandler.dump_traceback_later(90, exit=True)
for _ in range(60):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for _ in range(3):
        work = dist.all_reduce(torch.ones(10), async_op=True)
        work.wait()
        del work
    leave_groups()
assert not dist.is_initialized()
"""


def test_no_deadlock_with_the_thread_that_frees_a_collective():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
