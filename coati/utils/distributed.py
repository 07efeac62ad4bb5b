"""Collectives that are the identity without a process group, so that callers need no special case
for one process."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from coati.utils.errors import RunFailed

Result = TypeVar("Result")


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if _grouped() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return dist.get_world_size() if _grouped() else 1


def is_rank_0() -> bool:
    return rank() == 0


def print_rank_0(*args, **kwargs) -> None:
    if is_rank_0():
        print(*args, **kwargs, flush=True)


def barrier() -> None:
    if _grouped():
        dist.barrier()


def all_reduce_sum(tensor: torch.Tensor, group=None) -> torch.Tensor:
    """Sum of ``tensor`` over the ranks of ``group``, in place; the identity without a process
    group."""
    if _grouped():
        dist.all_reduce(tensor, group=group)
    return tensor


def all_reduce_mean(tensor: torch.Tensor, group=None) -> torch.Tensor:
    """Mean of ``tensor`` over the ranks of ``group``, in place."""
    if _grouped():
        dist.all_reduce(tensor, group=group)
        tensor.div_(dist.get_world_size(group))
    return tensor


def all_gather_object(obj: Any) -> list[Any]:
    """``[obj of rank 0, obj of rank 1, ...]`` on every rank."""
    if not _grouped():
        return [obj]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, obj)
    return gathered


def broadcast_object(obj: Any, source: int = 0) -> Any:
    """The ``obj`` of rank ``source``, on every rank."""
    if not _grouped():
        return obj
    box = [obj]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def any_rank(flag: bool) -> bool:
    """True on every rank when ``flag`` is true on at least one."""
    return any(all_gather_object(bool(flag)))


def raise_together(work: Callable[[], Result]) -> Result:
    """What ``work()`` returns on this rank. Every rank must call it.

    Raises ValueError, or the RunFailed that it was, on every rank when ``work`` raises one on any,
    naming the rank: one that went away alone would leave the others waiting for it.
    """
    result = None
    failure: ValueError | RunFailed | None = None
    try:
        result = work()
    except (ValueError, RunFailed) as error:
        failure = error
    kind = type(failure) if isinstance(failure, RunFailed) else ValueError
    failures = all_gather_object(None if failure is None else (kind, str(failure)))
    if failure is not None:
        raise failure
    for who, found in enumerate(failures):
        if found is not None:
            raise found[0](f"rank {who}: {found[1]}")
    return result
