"""ColossalAI's flash attention on torch's scaled dot product attention."""

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def sdpa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    scale: float | None = None,
    attention_mask: Tensor | None = None,
    is_causal: bool = False,
    cu_seqlens_q: Tensor | None = None,
    **_unused,
) -> Tensor:
    """Attention of ``q (B, H, Sq, D)`` over ``k`` and ``v (B, H, Skv, D)``, as ColossalAI calls its
    kernels.

    Source of the call: ColossalAI, shardformer/layer/attn.py, ``ColoAttention.attention``.
    """
    if is_causal and cu_seqlens_q is None and q.shape[-2] == k.shape[-2]:
        # Causal without padding: torch's fast path needs no mask.
        return scaled_dot_product_attention(
            q, k, v, dropout_p=dropout_p, scale=scale, is_causal=True
        )
    return scaled_dot_product_attention(
        q, k, v, attn_mask=attention_mask, dropout_p=dropout_p, scale=scale
    )
