"""Attention over rows that share prefixes, on CPUs: blocks of flash attention, merged by their
logsumexp.

A token attends causally within its own segment, and to whole prefixes. Each is a call of PyTorch's
flash attention for CPUs, which returns the logsumexp of its scores; the outputs of two blocks are
averaged in proportion to exp of these. With the merged output and logsumexp the backward of one
block is that of the whole (as in ring attention, arXiv 2310.01889).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Block(NamedTuple):
    """Queries that attend to keys, each a slice of the sequence."""

    queries: slice
    keys: slice
    causal: bool


def blocks_of(ends: Sequence[int], prefixes: Sequence[Sequence[int]]) -> list[Block]:
    """Of a :class:`~coati.models.prefix_layout.PrefixLayout`; every token's own segment comes
    first."""
    own = [Block(slice(*each), slice(*each), True) for each in pairwise(ends)]
    return own + [
        Block(slice(end, stop), slice(start, end), False) for start, end, stop in prefixes
    ]


def prefix_attention(
    query: Tensor, key: Tensor, value: Tensor, blocks: list[Block], scale: float | None
) -> Tensor:
    """``query`` (1, heads, T, D), ``key``, ``value`` (1, KV heads, T, D) -> (1, T, heads, D)."""
    if torch.is_autocast_enabled(query.device.type):  # as scaled_dot_product_attention has it
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    # Gemini's tensors do not follow in-place operations.
    query, key, value = (x.as_subclass(Tensor) for x in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return _PrefixAttention.apply(query, key, value, blocks, scale).transpose(1, 2)


class _PrefixAttention(torch.autograd.Function):
    """(1, heads, T, D) each -> (1, heads, T, D)."""

    @staticmethod
    def forward(ctx, query, key, value, blocks: list[Block], scale: float | None) -> Tensor:
        batch, heads, tokens, width = query.shape
        out = query.new_empty(batch, tokens, heads, width).transpose(1, 2)
        sums: Tensor | None = None  # logsumexp (1, heads, T)
        for at, to, causal in blocks:
            found, logsumexp = _flash(
                query[:, :, at], key[:, :, to], value[:, :, to], 0.0, causal, scale=scale
            )
            if sums is None:
                sums = logsumexp.new_empty(batch, tokens, heads).transpose(1, 2)
            if causal:
                out[:, :, at] = found
                sums[:, :, at] = logsumexp
            else:
                share = (logsumexp - sums[:, :, at]).sigmoid_().to(found.dtype)
                out[:, :, at].lerp_(found, share[..., None])
                sums[:, :, at] = torch.logaddexp(sums[:, :, at], logsumexp)
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.blocks = blocks
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        """(1, heads, T, D) -> gradients of query, key and value."""
        query, key, value, out, sums = ctx.saved_tensors
        to_query, to_key, to_value = (torch.zeros_like(x) for x in (query, key, value))
        for at, to, causal in ctx.blocks:
            found = _flash_backward(
                grad[:, :, at],
                query[:, :, at],
                key[:, :, to],
                value[:, :, to],
                out[:, :, at],
                sums[:, :, at],
                0.0,
                causal,
                scale=ctx.scale,
            )
            to_query[:, :, at] += found[0]
            to_key[:, :, to] += found[1]
            to_value[:, :, to] += found[2]
        return to_query, to_key, to_value, None, None
