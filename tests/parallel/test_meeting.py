"""Processes find each other at a store that may still hold what earlier ones wrote."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from coati.parallel.meeting import LaunchFailed, _gather, _join

WAIT_S = 20.0


def meet_in_threads(store, delays: dict[int, float], world_size: int = 2, wait_s: float = WAIT_S):
    """What each rank that comes, after its delay, gets or raises."""

    def come(rank: int):
        time.sleep(delays[rank])
        try:
            if rank == 0:
                return _gather(store, world_size, wait_s)
            return _join(store, rank, world_size, 2 * wait_s)
        except LaunchFailed as error:
            return error

    with ThreadPoolExecutor(len(delays)) as pool:
        return list(pool.map(come, delays))


def test_all_get_the_same_group():
    first, second, third = meet_in_threads(dist.HashStore(), {0: 0, 1: 0.1, 2: 0.2}, 3)
    assert first["name"] == second["name"] == third["name"]
    assert len(first["members"]) == 3


@pytest.mark.parametrize("delays", [{0: 0, 1: 0.5}, {0: 0.5, 1: 0}])
def test_a_restarted_group_never_meets_what_earlier_processes_left(delays):
    """Whoever comes first finds the complete entries of the two before, and of a third time."""
    store = dist.HashStore()
    names = set()
    for _ in range(3):
        first, second = meet_in_threads(store, delays)
        assert first["name"] == second["name"]
        names.add(first["name"])
    assert len(names) == 3


def test_a_process_that_is_replaced_while_others_wait():
    """Rank 1 signs in and dies; its successor is the one that is met."""
    store = dist.HashStore()
    quick = threading.Thread(target=lambda: meet_in_threads(store, {1: 0}, 3, 0.3))
    quick.start()
    quick.join()
    first, second, third = meet_in_threads(store, {0: 0, 1: 0.3, 2: 0.6}, 3)
    assert first["name"] == second["name"] == third["name"]


def test_the_missing_are_named_to_all_and_stale_entries_do_not_count():
    store = dist.HashStore()
    meet_in_threads(store, {0: 0, 1: 0, 2: 0}, 3)
    first, second = meet_in_threads(store, {0: 0, 1: 0}, 3, 0.5)
    for rank, error in enumerate((first, second)):
        assert f"rank {rank}: no sign of rank 2 of 3" in str(error)


def test_rank_0_missing():
    (error,) = meet_in_threads(dist.HashStore(), {1: 0}, 2, 0.3)
    assert "rank 1: no sign of rank 0 of 2" in str(error)
