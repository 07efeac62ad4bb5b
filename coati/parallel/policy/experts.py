"""Experts under tensor parallelism: every process holds a part of each expert's inner width, and
parameters that are no linear layer are split in place."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from colossalai.shardformer.layer._operation import reduce_forward
from colossalai.tensor.d_tensor.api import (
    customized_distributed_tensor_to_existing_param,
    distribute_tensor_with_customization,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from coati.parallel.policy.plan import Styles
from coati.parallel.policy.sequence import sum_gradients, sum_of

_SPLIT = ("colwise", "rowwise", "packed_colwise", "packed_rowwise")


def split_experts(module: nn.Module, name: str, styles: Styles, group: dist.ProcessGroup) -> None:
    """Split the parameters of ``module`` (called with states and the router's choices) by what the
    plan says of them. Outputs are summed over ``group``, and so are the gradients of what comes
    in, router weights included."""
    bias = None
    for own, _ in list(module.named_parameters(recurse=False)):
        style = styles.of(f"{name}.{own}")
        if style == "moe_output_bias":
            bias = own
            sum_gradients([getattr(module, own)], group)
        elif style is not None:
            split_parameter(module, own, style, group)

    def shared(value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.requires_grad):
            return value
        alias = value.view_as(value)  # the router may use the states, too
        alias.register_hook(lambda grad: sum_of(grad, group))
        return alias

    def before(module: nn.Module, args: tuple, keywords: dict) -> tuple[tuple, dict]:
        changed = {key: shared(value) for key, value in keywords.items()}
        return tuple(shared(value) for value in args), changed

    def after(module: nn.Module, args: tuple, keywords: dict, output: Tensor) -> Tensor:
        if bias is not None:
            output = output - _surplus_bias(getattr(module, bias), args, keywords, group)
        return reduce_forward(output.contiguous(), group)

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after, with_kwargs=True)


def split_expert_adapters(
    module: nn.Module, name: str, styles: Styles, group: dist.ProcessGroup
) -> nn.Module:
    """The experts inside peft's wrappers, one around the other for each adapted parameter, or
    ``module`` itself.

    Of an adapter the factor on the side where the parameter is split is split with it; the other
    stays whole, and as each process sees a part of its gradient, that is summed.
    """
    while isinstance(module, BaseTunerLayer):
        wrapped: Any = module
        style = styles.of(f"{name}.{wrapped.parameter_name}") or "replicate"
        if style not in _SPLIT:
            raise ValueError(
                f"--tp with --lora_experts: the plan asks {style} of {name}."
                f"{wrapped.parameter_name}, whose adapter cannot be split so; drop --lora_experts, "
                "or use --plugin zero2"
            )
        # Stored as (experts, out, in), or the other way around.
        transposed = getattr(wrapped.get_base_layer(), "is_transposed", False)
        split_a = style.endswith("rowwise") != transposed
        for key in wrapped.lora_A:
            factors = (wrapped.lora_A[key], wrapped.lora_B[key])
            split, whole = factors if split_a else reversed(factors)
            packed = "packed_" if style.startswith("packed_") else ""
            split_parameter(split, "weight", packed + ("rowwise" if split_a else "colwise"), group)
            sum_gradients([whole.weight], group)
        module = wrapped.base_layer
    return module


def _surplus_bias(bias: Tensor, args: tuple, keywords: dict, group: dist.ProcessGroup) -> Tensor:
    """What of the experts' output bias (experts, H) each process must leave out, so that the sum
    over ``group`` has it once: (tokens, H)."""
    ways = dist.get_world_size(group)
    values = [*args[1:], *keywords.values()]
    chosen = next(value for value in values if not value.is_floating_point())  # (tokens, k)
    weights = next(value for value in values if value.is_floating_point())
    if weights.shape != chosen.shape:  # (tokens, experts): the weight of each expert
        weights = weights.gather(1, chosen)
    return (1 - 1 / ways) * (weights[..., None] * bias[chosen]).sum(dim=-2).to(bias.dtype)


def split_parameter(module: nn.Module, name: str, style: str, group: dist.ProcessGroup) -> None:
    """Keep this process's part of a parameter; saving gathers the whole again.

    ``style``: "colwise" splits the last dimension but one (of a vector the only one), "rowwise" the
    last; "packed_" before it: each half (gate, up) for itself. Raises ValueError for a size that
    does not divide.
    """
    parameter = getattr(module, name)
    parts = 2 if style.startswith("packed_") else 1
    dim = -1 if style.endswith("rowwise") or parameter.dim() == 1 else -2
    ways = dist.get_world_size(group)
    width = parameter.shape[dim]
    if width % (parts * ways):
        raise ValueError(
            f"--tp {ways}: {name} of {type(module).__name__} has {width // parts} columns, which "
            f"cannot be divided by {ways}"
        )
    shard, gather = _cutters(parts, dim, group)
    whole = distribute_tensor_with_customization(parameter.data, shard, gather)
    customized_distributed_tensor_to_existing_param(whole, parameter)


def _cutters(
    parts: int, dim: int, group: dist.ProcessGroup
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Functions whole -> part of this process, and part -> whole."""
    ways = dist.get_world_size(group)
    rank = dist.get_rank(group)

    def shard(whole: Tensor) -> Tensor:
        halves = [half.chunk(ways, dim=dim)[rank] for half in whole.chunk(parts, dim=dim)]
        return torch.cat(halves, dim=dim).contiguous()

    def gather(mine: Tensor) -> Tensor:
        mine = mine.contiguous()
        found = [torch.empty_like(mine) for _ in range(ways)]
        dist.all_gather(found, mine, group=group)
        halves = [
            torch.cat([each.chunk(parts, dim=dim)[half] for each in found], dim=dim)
            for half in range(parts)
        ]
        return torch.cat(halves, dim=dim)

    return shard, gather
