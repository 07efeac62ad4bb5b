"""Leaving process groups without the deadlock of gloo's destructor.

A thread of gloo frees a finished collective while it holds the group's mutex, and for the tensor in
it may need Python's lock. The destructor of the group, called by Python, holds that lock and waits
for the mutex: both wait forever (seen with torch 2.5.1, stacks of both threads: runLoop ->
~TensorImpl -> take_gil, ~ProcessGroupGloo -> pthread_mutex_lock). So no group is destroyed at the
moment at which its last collective has just ended.
"""

import time
from typing import Any

import torch.distributed as dist

PAUSE_S = 0.05  # without Python's lock, for the thread that needs it

_left: list[Any] = []  # groups that are destroyed when the next ones are left, or with the process


def leave_groups() -> None:
    """Leave all process groups of this process. Every rank must call it."""
    groups = list(dist.distributed_c10d._world.pg_map)
    dist.destroy_process_group()
    time.sleep(PAUSE_S)
    _left[:] = groups
