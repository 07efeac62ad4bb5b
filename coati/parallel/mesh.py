"""Position of a process in the data-parallel and model-parallel groups."""

from dataclasses import dataclass

import torch.distributed as dist
from torch import nn

from coati.parallel.plugins import PLUGINS


@dataclass(frozen=True)
class Mesh:
    """Position of this process: ``dp_rank`` of ``dp_size`` shares of the data.

    Attributes:
        is_loss_rank: one process per share (under a pipeline: of its last stage), whose loss,
            counts and metrics are those of the share.
        is_stage_writer: of the processes that hold the same layers of one copy of the model, the
            one that writes them.
        sharded_forward: a forward gathers parameters from the other shares (ZeRO-3).
    """

    dp_rank: int
    dp_size: int
    is_loss_rank: bool
    last_stage: bool = True
    is_stage_writer: bool = True
    pp_size: int = 1
    tp_group: dist.ProcessGroup | None = None
    sharded_forward: bool = False

    @classmethod
    def of(cls, plugin) -> "Mesh":
        """Read the position off a ColossalAI plugin."""
        kind = type(plugin).__name__
        row = next((row for row in PLUGINS.values() if row.upstream == kind), None)
        if row is not None and row.hybrid:
            return cls._of_hybrid(plugin)
        if row is not None and row.sharded_forward:
            size = plugin.tp_size
            return cls(
                dist.get_rank() // size,
                plugin.dp_size,
                is_loss_rank=dist.get_rank() % size == 0,
                is_stage_writer=dist.get_rank() % size == 0,
                tp_group=plugin.tp_group if size > 1 else None,
                sharded_forward=True,
            )
        return cls(dist.get_rank(), dist.get_world_size(), is_loss_rank=True)

    @classmethod
    def _of_hybrid(cls, plugin) -> "Mesh":
        mesh = plugin.pg_mesh
        axes = (plugin.dp_axis, plugin.pp_axis, plugin.tp_axis, plugin.sp_axis)
        position = {axis: int(mesh.coordinate(axis)) for axis in axes}
        pp_size = mesh.size(plugin.pp_axis)
        last = position[plugin.pp_axis] == pp_size - 1
        first_of_copy = position[plugin.tp_axis] == 0 and position[plugin.sp_axis] == 0
        return cls(
            position[plugin.dp_axis],
            mesh.size(plugin.dp_axis),
            is_loss_rank=last and first_of_copy,
            last_stage=last,
            is_stage_writer=first_of_copy,
            pp_size=pp_size,
            tp_group=plugin.tp_group if plugin.tp_size > 1 else None,
        )


def inner_module(model: nn.Module) -> nn.Module:
    """The user's module inside ColossalAI's and PyTorch's wrappers; a PEFT model stays a PEFT
    model."""
    from colossalai.interface import ModelWrapper
    from torch.nn.parallel import DistributedDataParallel

    while isinstance(model, ModelWrapper | DistributedDataParallel):
        model = model.module
    return model
