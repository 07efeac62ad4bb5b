"""Losses as pure functions of tensors: one value per example or token out, the caller reduces."""

import torch
from torch import Tensor, nn

from coati.models.logprobs import IGNORE_INDEX, logprobs_from_logits


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of ``values`` where ``mask`` (same shape, bool or 0/1) is set, over ``dim`` or everything.

    A masked value never counts, not even NaN; the mean of nothing is 0.
    """
    mask = mask.bool()
    kept = values.masked_fill(~mask, 0)
    if dim is None:
        return kept.sum() / mask.sum().clamp(min=1)
    return kept.sum(dim) / mask.sum(dim).clamp(min=1)


class GPTLMLoss(nn.Module):
    """Mean negative log-probability of the labelled tokens, from full logits.

    The trainers do not use it: they sum log-probs that :class:`~coati.models.head.Head` gives without full logits.
    """

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """``logits`` (B, S, V), ``labels`` (B, S); position t predicts ``labels[:, t + 1]``, -100 is left out.

        A scalar in fp32; 0, not NaN, where nothing is labelled.
        """
        logps = logprobs_from_logits(logits, labels, IGNORE_INDEX)
        return masked_mean(-logps, torch.ones_like(logps))
