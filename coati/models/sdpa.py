"""What transformers' "sdpa" is taught on CPUs: rows laid end to end, and one query at a time
without copies."""

import torch
import torch.nn.functional as F
from torch import Tensor


def teach_sdpa() -> None:
    """Register an "sdpa" that goes row by row where it is told the ends of rows, reads a key-value
    cache where it lies when each row asks for one position, and is the original otherwise. The
    numbers are the original's, to rounding."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if getattr(original, "taught", False):
        return

    def attention(module, query, key, value, attention_mask, **keywords):
        ends = keywords.get("cu_seq_lens_q")
        dropout, scale = keywords.get("dropout", 0.0), keywords.get("scaling")
        if ends is not None:
            lengths = [length for length in ends.diff().tolist() if length]
            return row_by_row(query, key, value, lengths, dropout, scale), None
        if query.shape[2] == 1 and not dropout and query.device.type == "cpu":
            return one_query(query, key, value, attention_mask, scale), None
        return original(module, query, key, value, attention_mask, **keywords)

    attention.taught = True
    ALL_ATTENTION_FUNCTIONS.register("sdpa", attention)


def row_by_row(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], dropout: float, scale: float
) -> Tensor:
    """Causal attention of each row with itself: ``query`` (1, heads, T, D), ``key``, ``value`` (1,
    KV heads, T, D) with T the sum of ``lengths`` -> (1, T, heads, D)."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    rows = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    outs = [
        F.scaled_dot_product_attention(*row, dropout_p=dropout, is_causal=True, scale=scale)
        for row in rows
    ]
    return torch.cat([out.transpose(1, 2) for out in outs], dim=1)


def one_query(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Attention of the last position: ``query`` (B, heads, 1, D), ``key``, ``value`` (B, KV heads,
    T, D), ``mask`` (B, 1, 1, at least T) to add, or None -> (B, 1, heads, D).

    The queries that share a key head stand where positions would: keys are neither repeated nor
    made contiguous, which for every token of an answer would copy the whole cache.
    """
    batch, heads, _, width = query.shape
    shared = query.reshape(batch, key.shape[1], heads // key.shape[1], width)
    if mask is not None:
        mask = mask[..., : key.shape[2]]
    out = F.scaled_dot_product_attention(shared, key, value, attn_mask=mask, scale=scale)
    return out.reshape(batch, 1, heads, value.shape[-1])
