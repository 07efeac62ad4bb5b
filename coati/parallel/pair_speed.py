"""How fast two hosts reach each other: a timed all-reduce between each pair of them."""

import os
import statistics
import time
from datetime import timedelta
from itertools import combinations
from typing import Any

import torch
import torch.distributed as dist

from coati.parallel.agreement import Exchange
from coati.parallel.interfaces import choose_interface
from coati.parallel.leave_groups import leave_groups

ROUNDS = 30
LARGE_ROUNDS = 3
LARGE = {"gloo": 8 * 2**20, "nccl": 256 * 2**20}  # bytes


def measure_pairs(
    rank: int, world_size: int, address: str, port: int, device: str = "cpu", timeout_s: float = 60
) -> dict[str, dict[str, float]]:
    """``{"0-1": {"latency_ms", "mib_per_s"}}`` of the pairs in which ``rank``, one for each host,
    takes part; the others wait meanwhile.

    ``device``: "cuda" measures NCCL, "cpu" gloo. Bytes per second count the tensor once. Raises
    RuntimeError where two do not reach each other within ``timeout_s``.
    """
    os.environ["MASTER_ADDR"] = address
    os.environ["MASTER_PORT"] = str(port)
    wait = timedelta(seconds=timeout_s)
    store = dist.TCPStore(address, port, world_size, rank == 0, wait, wait_for_workers=False)
    choose_interface(Exchange(dist.PrefixStore("interfaces", store), rank, world_size))
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("pairs", store),
        rank=rank,
        world_size=world_size,
        timeout=wait,
    )
    found = {}
    try:
        for pair in combinations(range(world_size), 2):
            group = dist.new_group(list(pair), timeout=wait)
            dist.barrier()
            if rank in pair:
                found[f"{pair[0]}-{pair[1]}"] = _measured(group, device, LARGE[backend])
        dist.barrier()
        return found
    finally:
        leave_groups()


def _measured(group: Any, device: str, size: int) -> dict[str, float]:
    small = torch.zeros(1, device=device)
    large = torch.zeros(size // 4, device=device)
    for tensor in (small, large):  # connects
        dist.all_reduce(tensor, group=group)
    latency = statistics.median(_seconds(small, group) for _ in range(ROUNDS))
    best = min(_seconds(large, group) for _ in range(LARGE_ROUNDS))
    return {"latency_ms": latency * 1e3, "mib_per_s": size / 2**20 / best}


def _seconds(tensor: torch.Tensor, group: Any) -> float:
    started = time.perf_counter()
    dist.all_reduce(tensor, group=group)
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started
