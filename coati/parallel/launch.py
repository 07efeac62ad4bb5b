"""Joining the other processes: with a launcher's variables or, without any launcher, as a group of
one."""

import atexit
import os
import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from coati.parallel.agreement import Exchange, agree
from coati.parallel.heartbeat import NO_TIMEOUT, Heartbeat, Places, is_lost_connection
from coati.parallel.interfaces import choose_interface
from coati.parallel.leave_groups import leave_groups
from coati.parallel.meeting import LaunchFailed, Meeting, meet
from coati.utils.constants import COLLECTIVE_TIMEOUT_S
from coati.utils.environment import must_be_same
from coati.utils.errors import RunFailed
from coati.utils.logging import get_logger

logger = get_logger(__name__)

SAME_ENVIRONMENT = "give all hosts the same checkout and virtual environment, and start again"

__all__ = ["LaunchFailed", "explained", "launch", "set_seed", "shut_down", "warn_of_threads"]
_heartbeat: Heartbeat | None = None


def launch(
    seed: int = 42,
    handshake_s: float = 60.0,
    timeout_s: float = COLLECTIVE_TIMEOUT_S,
) -> torch.device:
    """Join the process group and return this process's device.

    Without ``RANK`` in the environment the process is a group of its own: no launcher, no port, no
    host name. Several processes watch each other from then on (:mod:`coati.parallel.heartbeat`):
    a rank that is silent for ``timeout_s`` seconds ends the others.

    Raises:
        LaunchFailed: on every rank, naming the ranks that did not appear within ``handshake_s``
            seconds.
        RanksDiffer: on every rank, naming what their hosts do not have in common.
    """
    device = _device()
    if not dist.is_initialized():
        _wait_without_end()
        backend = "nccl" if device.type == "cuda" else "gloo"
        store: Any = dist.HashStore()
        rank = 0
        world_size = 1
        if "RANK" in os.environ:
            meeting = meet(handshake_s, NO_TIMEOUT)
            rank = meeting.rank
            world_size = len(meeting.hosts)
            store = dist.PrefixStore("group", meeting.store)
            _watch(meeting, timeout_s, device)
            _look_around(meeting)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=NO_TIMEOUT
        )
    set_seed(seed)
    return device


def _look_around(meeting: Meeting) -> None:
    """Before the ranks depend on it: the same environment, and an interface that others reach."""
    world_size = len(meeting.hosts)
    if world_size == 1:
        return
    exchange = Exchange(dist.PrefixStore("around", meeting.store), meeting.rank, world_size)
    agree(lambda facts: facts, must_be_same, exchange, remedy=SAME_ENVIRONMENT)
    agree(lambda _: {}, lambda: choose_interface(exchange), exchange)


def _wait_without_end() -> None:
    """Groups that others make (ColossalAI's meshes) have torch's default time-outs, 10 and 30
    minutes, whatever those of the first group are. What waits too long is for heartbeats to say."""
    dist.distributed_c10d.default_pg_timeout = NO_TIMEOUT
    dist.distributed_c10d.default_pg_nccl_timeout = NO_TIMEOUT


def _watch(meeting: Meeting, timeout_s: float, device: torch.device) -> None:
    global _heartbeat
    if len(meeting.hosts) == 1:
        return
    host, port = meeting.address
    places = Places(
        rank=meeting.rank,
        hosts=meeting.hosts,
        connect=meeting.connect,
        address=f"{host}:{port}",
        hosted_by_rank_0=meeting.hosted_by_rank_0,
        on_gpu=device.type == "cuda",
    )
    _heartbeat = Heartbeat(places, timeout_s)
    _heartbeat.start()
    atexit.register(_heartbeat.stop)


def explained(error: BaseException) -> BaseException:
    """``error``; or, where it is that of a collective whose other side has gone, a RunFailed that
    names the rank that has ended."""
    if _heartbeat is None or not is_lost_connection(error):
        return error
    return RunFailed(_heartbeat.explain())


def shut_down(wait: bool = False) -> None:
    """Leave the process group, if there is one. ``wait``: for the other ranks to leave it too,
    where this one holds what they watch each other by; they must all have ended well."""
    global _heartbeat
    if _heartbeat is not None:
        atexit.unregister(_heartbeat.stop)
        _heartbeat.leave(wait)
        _heartbeat = None
    if dist.is_initialized():
        leave_groups()


def set_seed(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    found = torch.cuda.device_count()
    if local_rank >= found:
        raise LaunchFailed(
            f"LOCAL_RANK {local_rank} needs {local_rank + 1} GPUs, this host shows {found}; lower "
            "--nproc_per_node or check "
            f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '(not set)')}"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def warn_of_threads() -> None:
    """Say once when several processes of one host would each use every core (a CPU run without
    OMP_NUM_THREADS)."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if (
        not torch.cuda.is_available()
        and local > 1
        and torch.get_num_threads() > 1
        and torch.get_num_threads() * local > (os.cpu_count() or 1)
    ):
        logger.info(
            f"{local} processes x {torch.get_num_threads()} threads on {os.cpu_count()} cores slow "
            f"each other down; set OMP_NUM_THREADS={max(1, (os.cpu_count() or 1) // local)}"
        )
