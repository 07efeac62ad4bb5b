"""Sequence parallelism: each process is given its part of the tokens."""

from types import MethodType

import torch
import torch.distributed as dist
from colossalai.shardformer.layer._operation import (
    all_to_all_comm,
    gather_forward_split_backward,
)
from torch import Tensor, nn


def split(policy, described: dict) -> None:
    """Let ``policy.model`` run on this process's part of the tokens (all_to_all)."""
    group = policy.shard_config.sequence_parallel_process_group
    ways = dist.get_world_size(group)
    mine = dist.get_rank(group)
    base = policy.base
    attention = _UlyssesAttention(group, ways)
    name = attention.register()
    policy.model.config._attn_implementation = base.config._attn_implementation = name
    whole = base.forward

    def forward(base, input_ids=None, attention_mask=None, position_ids=None, **keywords):
        width = input_ids.shape[1]
        if width % ways:
            raise ValueError(f"{width} tokens cannot be divided by --sp {ways}")
        if position_ids is None:
            position_ids = torch.arange(width, device=input_ids.device)[None]
        attention.mask = attention_mask
        part = slice(mine * width // ways, (mine + 1) * width // ways)
        outputs = whole(
            input_ids=input_ids[:, part], position_ids=position_ids[:, part], **keywords
        )
        outputs["last_hidden_state"] = gather_forward_split_backward(
            outputs[0], 1, group, grad_scale=ways
        )
        return outputs

    base.forward = MethodType(forward, base)


class _UlyssesAttention:
    """Heads are exchanged for tokens around attention, so that each process has all tokens of its
    heads (DeepSpeed-Ulysses, arXiv 2309.14509)."""

    def __init__(self, group: dist.ProcessGroup, ways: int) -> None:
        self.group = group
        self.ways = ways
        self.mask: Tensor | None = None

    def register(self) -> str:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        name = f"coati_ulysses_{id(self)}"
        ALL_ATTENTION_FUNCTIONS.register(name, self)
        return name

    def __call__(
        self, module, query, key, value, attention_mask, dropout=0.0, scaling=None, **keywords
    ):
        width = value.shape[-1]
        query, key, value = (self._exchange(states) for states in (query, key, value))
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        mask = None
        if self.mask is not None and not bool(self.mask.all()):
            total = query.shape[2]
            causal = torch.ones(total, total, dtype=torch.bool, device=query.device).tril()
            # A padding position sees itself, so that no row of the softmax is empty.
            own = torch.eye(total, dtype=torch.bool, device=query.device)
            mask = causal & self.mask.bool()[:, None, None] | own
        out = nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
        )
        out = all_to_all_comm(
            out.transpose(1, 2).flatten(2).contiguous(), self.group, scatter_dim=1, gather_dim=2
        )
        return out.unflatten(2, (-1, width)), None

    def _exchange(self, states: Tensor) -> Tensor:
        width = states.shape[-1]
        flat = states.transpose(1, 2).flatten(2).contiguous()
        swapped = all_to_all_comm(flat, self.group, scatter_dim=2, gather_dim=1)
        return swapped.unflatten(2, (-1, width)).transpose(1, 2)
