"""What is asked of a ColossalAI that nothing has been done to, each time in a process of its
own."""

import torch
import torch.distributed as dist


def still_needed() -> dict[str, bool]:
    """For each patch and fix, whether the upstream code still misbehaves without it."""
    from coati.parallel.compat.import_colossalai import import_colossalai

    import_colossalai()
    from coati.parallel.compat.cpu import CPU_PATCHES
    from coati.parallel.compat.fixes import FIXES

    return {patch.name: patch.still_needed() for patch in (*CPU_PATCHES, *FIXES)}


def applied_twice() -> tuple[list[str], list[str]]:
    """The names of the patches that a first and a second call applied."""
    from coati.parallel.compat import cpu, fixes

    return fixes.apply() + cpu.apply(), fixes.apply() + cpu.apply()


def clipped_bf16_moment() -> float:
    """The first moment after one HybridAdam step on a bf16 gradient of 1, divided by 2, with beta1
    0.5."""
    from coati.parallel.compat import cpu, fixes

    fixes.apply()
    cpu.apply()
    from colossalai.nn.optimizer import HybridAdam

    param = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = HybridAdam([param], betas=(0.5, 0.5))
    param.grad = torch.ones_like(param)
    optimizer.step(div_scale=2.0)
    return optimizer.state[param]["exp_avg"].item()


def emulated_collectives() -> bool:
    """On two ranks: reduce-scatter, all-to-all and average made from what every gloo has."""
    from coati.parallel.compat.cpu import collectives

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mine = [
        torch.tensor([[rank + 1.0]]),
        torch.tensor([[10.0 * (rank + 1)]]),
    ]  # rank 0: 1, 10; rank 1: 2, 20
    scattered = torch.zeros(1, 1)
    collectives.reduce_scatter(scattered, mine)
    received = [torch.zeros(1, 1), torch.zeros(1, 1)]
    collectives.all_to_all(received, mine, async_op=True).wait()
    # Summed in bf16, 1 + 2**-8 would be 1; only together the small parts count.
    small = torch.tensor([1.0, 2.0**-8][rank]).repeat(2).bfloat16()
    summed = torch.zeros(1)
    collectives.reduce_scatter_tensor(summed, small)
    averaged = torch.zeros(1)
    collectives.reduce_scatter_tensor(averaged, torch.cat(mine).view(-1), dist.ReduceOp.AVG)
    counted = torch.zeros(1, dtype=torch.int64)
    collectives.reduce_scatter_tensor(counted, torch.tensor([1, 2]), dist.ReduceOp.MAX)
    mean = torch.tensor([float(rank)])
    collectives.averaging(dist.all_reduce)(mean, op=dist.ReduceOp.AVG)
    return (
        scattered.item() == (3.0, 30.0)[rank]
        and [tensor.item() for tensor in received] == [[1.0, 2.0], [10.0, 20.0]][rank]
        and summed.item() == 1 + 2.0**-8
        and averaged.item() == (1.5, 15.0)[rank]
        and counted.item() == (1, 2)[rank]
        and mean.item() == 0.5
    )
