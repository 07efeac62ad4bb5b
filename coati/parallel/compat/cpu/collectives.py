"""The collectives that gloo lacks, or makes of others that send more, made from those it has."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore, ProcessGroupGloo

_torch_reduce_scatter_tensor = dist.reduce_scatter_tensor


class Done:
    """The handle of a collective that has already happened."""

    def wait(self, timeout=None) -> bool:
        """True at once."""
        return True


def _lone_group() -> Any:
    """A gloo group of this process alone, outside torch's registry: what it cannot do, no gloo
    group can."""
    lone: Any = ProcessGroupGloo  # torch describes another signature
    return lone(HashStore(), 0, 1)


def _fails(call) -> bool:
    try:
        call().wait()
    except RuntimeError:
        return True
    return False


def lacks_all_to_all() -> bool:
    """Whether gloo refuses an all-to-all of lists of tensors."""
    return _fails(
        lambda: _lone_group().alltoall([torch.zeros(1)], [torch.ones(1)], dist.AllToAllOptions())
    )


def lacks_average() -> bool:
    """Whether gloo refuses to average."""
    options: Any = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp.AVG
    return _fails(lambda: _lone_group().allreduce([torch.ones(1)], options))


def sends_chunks_twice() -> bool:
    """Whether gloo's reduce-scatters are all-reduces of which each rank keeps a chunk: so in every
    release to 2.14 (ProcessGroupGloo.cpp). What they send shows between two processes alone:
    benchmarks/bench_bytes.py measures it."""
    return dist.is_gloo_available()


SUMS = (dist.ReduceOp.SUM, dist.ReduceOp.AVG)
EXTREMES = (dist.ReduceOp.MAX, dist.ReduceOp.MIN)  # gloo of torch 2.5 sums, whatever it is asked


def reduce_scatter_tensor(output, input, op=dist.ReduceOp.SUM, group=None, async_op=False):
    """``dist.reduce_scatter_tensor`` that sends each chunk once, to the rank that keeps it and sums
    in the order of the ranks, narrow types in fp32; done when it returns."""
    if op not in (*SUMS, *EXTREMES):
        return _torch_reduce_scatter_tensor(output, input, op=op, group=group, async_op=async_op)
    ways = dist.get_world_size(group)
    received = torch.empty_like(input.reshape(-1))
    dist.all_to_all_single(received, input.reshape(-1).contiguous(), group=group)
    first, *others = received.chunk(ways)
    if op in EXTREMES:
        largest = op == dist.ReduceOp.MAX
        chunks = torch.stack([first, *others])
        output.copy_((chunks.amax(0) if largest else chunks.amin(0)).view_as(output))
        return Done() if async_op else None
    fraction = input.is_floating_point()
    wide = torch.promote_types(input.dtype, torch.float32) if fraction else input.dtype
    total = first.to(wide, copy=True)
    for chunk in others:
        total += chunk
    if op == dist.ReduceOp.AVG:
        total = total / ways
    output.copy_(total.view_as(output))
    return Done() if async_op else None


def reduce_scatter(output, input_list, op=dist.ReduceOp.SUM, group=None, async_op=False):
    """``dist.reduce_scatter`` through the form that takes one tensor; done when it returns."""
    flat = torch.cat([tensor.reshape(-1) for tensor in input_list])
    chunk = torch.empty_like(output).view(-1)
    reduce_scatter_tensor(chunk, flat, op=op, group=group)
    output.copy_(chunk.view_as(output))
    return Done() if async_op else None


def all_to_all(output_tensor_list, input_tensor_list, group=None, async_op=False):
    """``dist.all_to_all`` through the form that takes one tensor; done when it returns."""
    flat = torch.cat([tensor.reshape(-1) for tensor in input_tensor_list])
    received = flat.new_empty(sum(tensor.numel() for tensor in output_tensor_list))
    output_sizes = [tensor.numel() for tensor in output_tensor_list]
    dist.all_to_all_single(
        received, flat, output_sizes, [t.numel() for t in input_tensor_list], group=group
    )
    for output, part in zip(output_tensor_list, received.split(output_sizes), strict=True):
        output.copy_(part.view_as(output))
    return Done() if async_op else None


def averaging(all_reduce):
    """``all_reduce`` that knows ``ReduceOp.AVG``: a sum, divided."""

    def averaging_all_reduce(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        if op != dist.ReduceOp.AVG:
            return all_reduce(tensor, op=op, group=group, async_op=async_op)
        all_reduce(tensor, group=group)
        tensor.div_(dist.get_world_size(group))
        return Done() if async_op else None

    return averaging_all_reduce


def install(name: str, emulation: Callable, lacks: Callable[[], bool]) -> None:
    """Give ``torch.distributed`` the ``emulation`` of its function ``name``, if gloo ``lacks`` a
    good one of its own."""
    if lacks():
        setattr(dist, name, emulation)
