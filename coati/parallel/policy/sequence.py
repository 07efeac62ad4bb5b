"""Sequence parallelism: between the layers' blocks each process holds its part of the tokens.

The base model's forward makes masks and positions for the whole sequence, as ever. Its states are
split before the first layer and gathered after the last. Modes ``split_gather`` and ``ring`` (over
the tensor-parallel processes, arXiv 2205.05198) gather them again for each attention and MLP, whose
heads and columns are split; ``all_to_all`` (DeepSpeed-Ulysses, arXiv 2309.14509) exchanges tokens
for heads around the attention function. Either way attention sees whole rows under the model's own
mask, so windows, sinks and soft caps are the model's.
"""

import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from colossalai.shardformer.layer._operation import (
    all_to_all_comm,
    gather_forward_split_backward,
    split_forward_gather_backward,
)
from torch import Tensor, nn

from coati.parallel.policy.pipeline import Stack
from coati.parallel.policy.plan import Styles, tp_plan
from coati.utils.transformers_compat import text_config


def split(policy) -> None:
    """Let ``policy.base`` run on this process's part of the tokens.

    Raises ValueError where a layer is no attention with keys and values of every token.
    """
    config = policy.shard_config
    shared = config.sequence_parallelism_mode != "all_to_all"
    group = (
        config.tensor_parallel_process_group if shared else config.sequence_parallel_process_group
    )
    parts = _Parts(group, averaged=not shared)
    layers = list(Stack(policy.base).layers)
    for layer in layers:
        layer.register_forward_pre_hook(parts.remember_width, with_kwargs=True)
    layers[0].register_forward_pre_hook(_first(parts.split), with_kwargs=True)
    layers[-1].register_forward_hook(_output(parts.whole))
    for child in (child for layer in layers for child in layer.children()):
        child.register_forward_pre_hook(parts.read_width, with_kwargs=True)
    if shared:
        _gather_for_blocks(policy, layers, parts)
    else:
        attention = _UlyssesAttention(parts)
        attention.install(policy.base)
        for layer in layers:
            layer.register_forward_pre_hook(parts.split_keywords, with_kwargs=True)
        attention.check_calls(policy.base, len(layers))
    for layer in layers:
        layer.register_forward_pre_hook(parts.write_width, with_kwargs=True)


class _Parts:
    """Splits states (B, S, ...) over the processes of ``group`` and puts them together; the last
    part is padded where S does not divide.

    ``averaged``: gradients are averaged over the group afterward, so those of what each process
    computes for its part alone are multiplied by its size.
    """

    def __init__(self, group: dist.ProcessGroup, averaged: bool) -> None:
        self.group = group
        self.ways = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.scale = self.ways if averaged else 1
        self.width = 0  # S of the forward that is running

    def pad(self, states: Tensor, dim: int = 1) -> Tensor:
        extra = -states.shape[dim] % self.ways
        return F.pad(states, [0, 0] * (states.dim() - 1 - dim) + [0, extra]) if extra else states

    def split(self, states: Tensor) -> Tensor:
        """(B, S, ...) -> (B, S / ways, ...)."""
        self.width = states.shape[1]
        return split_forward_gather_backward(
            self.pad(states), 1, self.group, grad_scale=1 / self.scale
        )

    def whole(self, states: Tensor) -> Tensor:
        """(B, S / ways, ...) -> (B, S, ...)."""
        gathered = gather_forward_split_backward(
            states.contiguous(), 1, self.group, grad_scale=self.scale
        )
        return gathered[:, : self.width]

    def mine(self, tensor: Tensor) -> Tensor:
        """This process's part of a tensor (B, S, ...) that needs no gradient."""
        return self.pad(tensor).chunk(self.ways, dim=1)[self.rank]

    def remember_width(self, module: nn.Module, args: tuple, keywords: dict) -> None:
        """A layer's pre-hook. With gradient checkpointing a layer that is computed again may belong
        to another forward than the last."""
        for name in ("position_ids", "position_embeddings"):
            if (known := _width(keywords.get(name))) is not None:
                self.width = known
                return

    def write_width(self, module: nn.Module, args: tuple, keywords: dict) -> None:
        """A layer's last pre-hook: from 5.23 on transformers computes a layer again without its
        hooks, but with what they made of its keywords."""
        for value in _tensors(keywords.get("position_embeddings")):
            value.whole_width = self.width

    def read_width(self, module: nn.Module, args: tuple, keywords: dict) -> None:
        """A pre-hook of a layer's children."""
        for value in _tensors(keywords.get("position_embeddings")):
            self.width = getattr(value, "whole_width", self.width)

    def split_keywords(self, module: nn.Module, args: tuple, keywords: dict) -> tuple[tuple, dict]:
        """A layer's pre-hook: of rotary embeddings and position ids the part of its tokens."""
        width = self.width

        def part(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(part(each) for each in value)
            whole = isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == width
            return self.mine(value) if whole else value

        kept = {"hidden_states", "attention_mask", "past_key_values", "cache"}
        changed = {name: value if name in kept else part(value) for name, value in keywords.items()}
        return (args[0], *(part(value) for value in args[1:])) if args else args, changed


def _tensors(value: Any) -> tuple[Any, ...]:
    """Those of a keyword that is a tensor or a tuple of them."""
    values = value if isinstance(value, tuple | list) else (value,)
    return tuple(each for each in values if isinstance(each, Tensor))


def _width(value: Any) -> int | None:
    value = value[0] if isinstance(value, tuple) and value else value
    return value.shape[1] if isinstance(value, Tensor) and value.dim() > 1 else None


def _first(change: Callable[[Tensor], Tensor]):
    """A pre-hook that changes a module's states, its first argument or ``hidden_states``."""

    def hook(module: nn.Module, args: tuple, keywords: dict) -> tuple[tuple, dict]:
        if args:
            return (change(args[0]), *args[1:]), keywords
        return args, keywords | {"hidden_states": change(keywords["hidden_states"])}

    return hook


def _output(change: Callable[[Tensor], Tensor]):
    """A hook that changes a module's output, or the first of a tuple of them."""

    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    return hook


# Modes over the tensor-parallel processes


def _gather_for_blocks(policy, layers: list[nn.Module], parts: _Parts) -> None:
    """Whole states into each child of a layer that is more than one operation on each token, this
    process's part out of it. Gradients of parameters outside of them, norms mostly, are summed over
    the processes."""
    styles = Styles(tp_plan(policy.inner.config))
    names = {module: name for name, module in policy.base.named_modules()}
    for layer in layers:
        for child in layer.children():
            if next(child.children(), None) is not None or styles.of(names[child]):
                if isinstance(child, nn.Linear):
                    raise ValueError(
                        f"--sp_mode {policy.shard_config.sequence_parallelism_mode}: the layers of "
                        f"{policy.base.config.model_type} models hold their linear layers "
                        "themselves, so there is no block to gather the tokens for; use --tp "
                        "without --enable_sequence_parallelism, or --sp_mode all_to_all"
                    )
                child.register_forward_pre_hook(_whole_arguments(parts), with_kwargs=True)
                child.register_forward_hook(_part_of_output(parts), with_kwargs=True)
            else:
                sum_gradients(child.parameters(), parts.group)
        sum_gradients(layer.parameters(recurse=False), parts.group)


def _whole_arguments(parts: _Parts):
    """A pre-hook that gathers every argument of the shape of the states (BLOOM gives its blocks the
    residual, too)."""

    def hook(module: nn.Module, args: tuple, keywords: dict) -> tuple[tuple, dict]:
        states = args[0] if args else keywords["hidden_states"]

        def whole(value: Any) -> Any:
            same = isinstance(value, Tensor) and value.shape == states.shape
            return parts.whole(value) if same else value

        changed = {name: whole(value) for name, value in keywords.items()}
        return tuple(whole(value) for value in args), changed

    return hook


def _part_of_output(parts: _Parts):
    """A hook that leaves this process's part of a block's output, which some blocks return as
    (B x S, D)."""

    def hook(module: nn.Module, args: tuple, keywords: dict, output: Any) -> Any:
        states = args[0] if args else keywords["hidden_states"]
        first, *rest = output if isinstance(output, tuple) else (output,)
        part = parts.split(first.view(*states.shape[:2], -1))
        return (part, *rest) if isinstance(output, tuple) else part

    return hook


def sum_gradients(parameters, group: dist.ProcessGroup) -> None:
    """Sum the gradients of ``parameters``, of which each process sees a part, over ``group``."""
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.register_hook(lambda grad: sum_of(grad, group))


def sum_of(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of the processes' tensors; theirs stay as they are."""
    total = tensor.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


# Ulysses


class _WithSinks:
    """An attention module as its eager function sees it, with the sinks of this process's heads."""

    def __init__(self, module: nn.Module, sinks: Tensor) -> None:
        self._module = module
        self.sinks = sinks
        self.__module__ = type(module).__module__

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _UlyssesAttention:
    """transformers' attention function of the model, around which heads are exchanged for tokens,
    so that each process has all tokens of its heads."""

    def __init__(self, parts: _Parts) -> None:
        self.parts = parts
        self.original = ""
        self.calls = 0

    def install(self, base: nn.Module) -> None:
        """Make it the attention of ``base``."""
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        config = text_config(base.config)
        self.original = config._attn_implementation
        name = f"coati_ulysses_{id(self)}"
        ALL_ATTENTION_FUNCTIONS.register(name, self)
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[self.original])
        for module in base.modules():  # some keep a configuration of their own
            if hasattr(module, "config"):
                module.config._attn_implementation = name

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        s_aux: Tensor | None = None,
        **keywords: Any,
    ) -> tuple[Tensor, None]:
        self.calls += 1
        parts = self.parts
        if keywords.get("position_bias") is not None:
            raise ValueError(
                "--sp_mode all_to_all: this model adds a bias of each position to attention, which "
                "cannot be split by heads here; use --tp or --pp"
            )
        query, key, value = (self._whole_rows(states) for states in (query, key, value))
        if s_aux is not None:  # an attention sink of each head
            keywords["s_aux"] = s_aux.chunk(parts.ways)[parts.rank]
            module = _WithSinks(module, keywords["s_aux"])
        attend = self._original(module)
        out = attend(module, query, key, value, attention_mask, **keywords)[0]  # (B, S, heads, D)
        heads = out.shape[2]
        flat = parts.pad(out).flatten(2).contiguous()
        mine = all_to_all_comm(flat, parts.group, scatter_dim=1, gather_dim=2)
        return mine.unflatten(2, (heads * parts.ways, -1)), None

    def _original(self, module: nn.Module) -> Callable:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        if self.original == "eager":
            return sys.modules[module.__module__].eager_attention_forward
        return ALL_ATTENTION_FUNCTIONS[self.original]

    def _whole_rows(self, states: Tensor) -> Tensor:
        """(B, heads, S / ways, D) -> (B, heads / ways, S, D)."""
        width = states.shape[-1]
        flat = states.transpose(1, 2).flatten(2).contiguous()
        whole = all_to_all_comm(flat, self.parts.group, scatter_dim=2, gather_dim=1)
        return whole[:, : self.parts.width].unflatten(2, (-1, width)).transpose(1, 2)

    def check_calls(self, base: nn.Module, layers: int) -> None:
        """Refuse a model that does not call this once in each layer: other layers than attention
        would take the part for the whole sequence."""
        whole = base.forward

        def forward(module: nn.Module, *args: Any, **keywords: Any) -> Any:
            self.calls = 0
            outputs = whole(*args, **keywords)
            if self.calls < layers:
                raise ValueError(
                    f"--sp_mode all_to_all: {type(base).__name__} runs transformers' attention "
                    f"function in {self.calls} of {layers} layers; the others would see a part of "
                    "the tokens only. Use --tp or --pp"
                )
            return outputs

        base.forward = MethodType(forward, base)
