"""Joining the other processes: with a launcher's variables or, without any launcher, as a group of
one."""

import os
import random
import re
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from queue import Empty, Queue
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from coati.parallel.agreement import Exchange, agree
from coati.parallel.interfaces import choose_interface, reachable_name
from coati.utils.environment import must_be_same
from coati.utils.errors import RunFailed
from coati.utils.host_address import addresses_of, is_loopback, port_in_use
from coati.utils.logging import get_logger

logger = get_logger(__name__)

SLACK_S = 5.0  # beyond torch's own time limit
IN_USE = re.compile("EADDRINUSE|address already in use", re.IGNORECASE)
SAME_ENVIRONMENT = "give all hosts the same checkout and virtual environment, and start again"


class LaunchFailed(RunFailed):
    """The processes did not come together."""


def launch(seed: int = 42, handshake_s: float = 60.0, timeout_s: float = 1800.0) -> torch.device:
    """Join the process group and return this process's device.

    Without ``RANK`` in the environment the process is a group of its own: no launcher, no port, no
    host name.

    Raises:
        LaunchFailed: on every rank, naming the ranks that did not appear within ``handshake_s``
            seconds, or what their hosts do not have in common.
    """
    device = _device()
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=timeout_s)
        if "RANK" in os.environ:
            store, rank, world_size = _meet(handshake_s, timeout)
        else:
            store = dist.HashStore()
            rank = 0
            world_size = 1
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timeout
        )
    set_seed(seed)
    return device


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


def _meet(handshake_s: float, timeout: timedelta):
    """Wait until every rank has signed in; ranks that do not are named instead of hung for."""
    missing_variables = [
        name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ
    ]
    if missing_variables:
        raise LaunchFailed(
            f"RANK is set but {', '.join(missing_variables)} not: start with colossalai run or "
            "torchrun, or unset RANK to run one process without a launcher"
        )
    rank = int(os.environ["RANK"])
    world_size = int(os.environ["WORLD_SIZE"])
    end = time.monotonic() + handshake_s
    store = _store(rank, world_size, handshake_s)
    store.set(f"here/{rank}", socket.gethostname())
    if rank == 0:
        missing = [r for r in range(world_size) if not _appears(store, f"here/{r}", end)]
        store.set("missing", ", ".join(map(str, missing)))
    # Rank 0 may have begun to wait later than this one.
    text = store.get("missing").decode() if _appears(store, "missing", end + handshake_s) else "0"
    met = Exchange(store, rank, world_size)
    if text:
        met.leave_together("missing")
        raise LaunchFailed(
            f"rank {rank}: no sign of rank {text} of {world_size} within {handshake_s:.0f} s; look "
            "at its host's log, at --nproc_per_node (the same on every host) and at the firewall"
        )
    if world_size > 1:
        agree(lambda facts: facts, must_be_same, met, remedy=SAME_ENVIRONMENT)
        agree(lambda _: {}, lambda: choose_interface(met), met)
    store.set_timeout(timeout)
    return dist.PrefixStore("group", store), rank, world_size


def _store(rank: int, world_size: int, wait_s: float):
    """What torch's env:// rendezvous makes, but without its wait for all, which cannot say who is
    missing."""
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun itself
    host = reachable_name(os.environ["MASTER_ADDR"], rank)
    port = int(os.environ["MASTER_PORT"])

    def connect():
        return dist.TCPStore(
            host,
            port,
            world_size,
            rank == 0 and not hosted,
            timedelta(seconds=wait_s),
            wait_for_workers=False,
            multi_tenant=True,
        )

    try:
        store = _in_time(connect, wait_s + SLACK_S)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise LaunchFailed(_no_store(error, rank, world_size, hosted, wait_s)) from error
    # A run that meets another one's store, whose port it was given, must not answer for its ranks.
    run = os.environ.get("COATI_RUN_ID") or os.environ.get("TORCHELASTIC_RUN_ID") or "run"
    return dist.PrefixStore(
        f"coati/{run}/attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store
    )


def _in_time(connect: Callable[[], Any], wait_s: float) -> Any:
    """What ``connect()`` returns. torch's own time limit does not hold where another program has
    the port and waits to be told more.

    Raises DistStoreError after ``wait_s``.
    """
    made: Queue[tuple[Any, BaseException | None]] = Queue()

    def work() -> None:
        try:
            made.put((connect(), None))
        except BaseException as error:
            made.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        store, error = made.get(timeout=wait_s)
    except Empty:
        raise dist.DistStoreError("what listens there does not answer as rank 0 would") from None
    if error is not None:
        raise error
    return store


def _no_store(error: Exception, rank: int, world_size: int, hosted: bool, wait_s: float) -> str:
    """Why there is no store to meet at."""
    host = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    here = socket.gethostname()
    if rank == 0 and not hosted and IN_USE.search(str(error)):
        return (
            f"rank 0: {port_in_use(port)}, and the ranks cannot meet there; end it, or choose "
            "another port: --master_port, or MASTER_PORT on every host"
        )
    text = (
        f"rank {rank} on {here}: no sign of rank 0 of {world_size} at {host}:{port} within "
        f"{wait_s:.0f} s ({error}); is the port open and rank 0 running?"
    )
    found = addresses_of(host)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if found and is_loopback(found[0]) and local < world_size:
        text += (
            f" {host} is {found[0]} on {here}, which is {here} itself: give the address of rank "
            "0's host instead of its name (--master_addr), or mend /etc/hosts"
        )
    return text


def _appears(store, key: str, end: float) -> bool:
    try:
        store.wait([key], timedelta(seconds=max(end - time.monotonic(), 0.01)))
    except dist.DistStoreError:
        return False
    return True


def shut_down() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


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
