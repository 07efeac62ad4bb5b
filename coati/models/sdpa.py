"""CPU overrides of transformers' "sdpa" attention: padding-free (varlen) rows, and single-token
decoding that does not copy the key-value cache."""

import torch
import torch.nn.functional as F
from torch import Tensor


def patch_sdpa() -> None:
    """Register an "sdpa" that attends row by row when it gets cumulative lengths, reads the
    key-value cache in place for one query per row, and is the original otherwise. Results are the
    original's, up to rounding."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if getattr(original, "patched", False):
        return

    def attention(module, query, key, value, attention_mask, **keywords):
        ends = keywords.get("cu_seq_lens_q")
        dropout = keywords.get("dropout", 0.0)
        scale = keywords.get("scaling")
        if ends is not None:
            lengths = [length for length in ends.diff().tolist() if length]
            return row_by_row(query, key, value, lengths, dropout, scale), None
        if query.shape[2] == 1 and not dropout and query.device.type == "cpu":
            return one_query(query, key, value, attention_mask, scale), None
        return original(module, query, key, value, attention_mask, **keywords)

    attention.patched = True  # type: ignore[attr-defined]
    ALL_ATTENTION_FUNCTIONS.register("sdpa", attention)


def row_by_row(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], dropout: float, scale: float
) -> Tensor:
    """Causal attention within each row: ``query`` (1, heads, T, D), ``key``, ``value`` (1,
    KV heads, T, D) with T the sum of ``lengths`` -> (1, T, heads, D)."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    rows = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    outs = [
        F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scale)
        for q, k, v in rows
    ]
    return torch.cat([out.transpose(1, 2) for out in outs], dim=1)


def one_query(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Attention of the last position: ``query`` (B, heads, 1, D), ``key``, ``value`` (B, KV heads,
    T, D), ``mask`` (B, 1, 1, at least T) to add, or None -> (B, 1, heads, D).

    The queries that share a key head take the place of positions: keys are neither repeated nor
    made contiguous, which would copy the whole cache for every token of a response.
    """
    batch, heads, _, width = query.shape
    shared = query.reshape(batch, key.shape[1], heads // key.shape[1], width)
    if mask is not None:
        mask = mask[..., : key.shape[2]]
    out = F.scaled_dot_product_attention(shared, key, value, attn_mask=mask, scale=scale)
    return out.reshape(batch, 1, heads, value.shape[-1])
