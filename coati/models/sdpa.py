"""An override of transformers' "sdpa" attention: padding-free (varlen) batches, and on CPUs
single-token decoding without copies of the key-value cache."""

import torch
import torch.nn.functional as F
from torch import Tensor

from coati.models.flash_varlen import flash_varlen
from coati.models.prefix_attention import blocks_of, prefix_attention


def patch_sdpa() -> None:
    """Replace "sdpa" by a function that runs row by row if it gets cumulative lengths (with
    ``shared_prefixes`` as :mod:`~coati.models.prefix_attention` says), reads the key-value cache in
    place for one query per row, and calls the original otherwise. Results equal the original's up
    to rounding."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if getattr(original, "patched", False):
        return

    def attention(module, query, key, value, attention_mask, **keywords):
        cu_seq_lens = keywords.get("cu_seq_lens_q")
        dropout = keywords.get("dropout", 0.0)
        scale = keywords.get("scaling")
        if any(keywords.get(name) is not None for name in ("position_bias", "softcap", "s_aux")):
            return original(module, query, key, value, attention_mask, **keywords)
        if cu_seq_lens is not None and keywords.get("shared_prefixes") is not None:
            if dropout:
                raise ValueError(
                    "attention dropout in rows that share tokens, which would share it, too: set "
                    "it before boost, or Engine.share_prefixes to False"
                )
            blocks = blocks_of(cu_seq_lens.tolist(), keywords["shared_prefixes"].tolist())
            return prefix_attention(query, key, value, blocks, scale), None
        if cu_seq_lens is not None and _on_gpu(query) and not dropout:
            longest = keywords["max_length_q"]
            return flash_varlen(query, key, value, cu_seq_lens, longest, scale), None
        if cu_seq_lens is not None:
            lengths = [length for length in cu_seq_lens.diff().tolist() if length]
            return varlen_attention(query, key, value, lengths, dropout, scale), None
        if query.shape[2] == 1 and not dropout and query.device.type == "cpu":
            return decode_attention(query, key, value, attention_mask, scale), None
        return original(module, query, key, value, attention_mask, **keywords)

    attention.patched = True  # type: ignore[attr-defined]
    ALL_ATTENTION_FUNCTIONS.register("sdpa", attention)


def _on_gpu(query: Tensor) -> bool:
    return query.device.type == "cuda"


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], dropout: float, scale: float
) -> Tensor:
    """Causal attention within each of the concatenated rows of ``lengths``, whose sum is T:
    ``query`` (1, heads, T, D), ``key``, ``value`` (1, KV heads, T, D) -> (1, T, heads, D)."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    rows = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    outputs = [
        F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scale)
        for q, k, v in rows
    ]
    return torch.cat([out.transpose(1, 2) for out in outputs], dim=1)


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Attention of one query per row: ``query`` (B, heads, 1, D), ``key``, ``value`` (B, KV heads,
    T, D), additive ``mask`` (B, 1, 1, T or more) or None -> (B, 1, heads, D).

    With grouped-query attention the heads that share a KV head are laid along the query's sequence
    dimension. Keys are then neither repeated nor made contiguous, which would copy the whole cache
    at every token.
    """
    batch, heads, _, width = query.shape
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], width)
    if mask is not None:
        mask = mask[..., : key.shape[2]]
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
    return out.reshape(batch, 1, heads, value.shape[-1])
