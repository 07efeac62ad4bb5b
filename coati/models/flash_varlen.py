"""Varlen attention on GPUs by the flash-attention kernels that PyTorch has from 2.10 on, for models
that run "sdpa", as they do where the package flash-attn is not installed."""

import importlib.util
import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def has_kernels() -> bool:
    """Whether this PyTorch has them."""
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


@cache
def _kernel() -> tuple[Any, frozenset[str]]:
    """The function, and its parameters, which differ between releases."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


def flash_varlen(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scale: float
) -> Tensor:
    """Causal attention within each of the concatenated rows: ``query`` (1, heads, T, D), ``key``,
    ``value`` (1, KV heads, T, D), ``ends`` (rows + 1,) int32 their cumulative lengths, ``longest``
    the largest -> (1, T, heads, D) in half precision.

    Raises RuntimeError for fp32 outside autocast, and what the kernels raise.
    """
    attend, parameters = _kernel()
    dtype = query.dtype
    if torch.is_autocast_enabled(query.device.type):  # as PyTorch's own attention has it
        dtype = torch.get_autocast_dtype(query.device.type)
    if dtype not in HALF:
        raise RuntimeError(f"the varlen kernels have no {dtype}")
    packed = [x[0].transpose(0, 1).to(dtype) for x in (query, key, value)]
    options: dict[str, Any] = {}
    if "scale" in parameters:
        options["scale"] = scale
    else:  # 2.10 divides by the root of the head's width
        packed[0] = packed[0] * (scale * packed[0].shape[-1] ** 0.5)
    if "window_size" in parameters:
        options["window_size"] = (-1, 0)
    else:
        options["is_causal"] = True
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and "enable_gqa" in parameters:
        options["enable_gqa"] = True
    elif groups > 1:
        packed[1:] = [x.repeat_interleave(groups, dim=1) for x in packed[1:]]
    return attend(*packed, ends, ends, longest, longest, **options)[None]
