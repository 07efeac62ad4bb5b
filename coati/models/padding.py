"""Rows of a batch moved so that padding stands at their end, whatever side it was on."""

import torch
from torch import Tensor


def right_pad_order(attention_mask: Tensor) -> Tensor:
    """(B, S) 0/1 -> (B, S) positions: the real tokens of each row in their order, then its padding.

    ``tensor.gather(1, real_first(mask))`` pads a (B, S) tensor on the right. A model counts
    positions from the start of a row, so only there do its numbers not depend on the side and
    amount of padding.
    """
    return torch.argsort(attention_mask.bool().logical_not().to(torch.uint8), dim=1, stable=True)


def restore_order(moved: Tensor, order: Tensor) -> Tensor:
    """The inverse: values (B, S) in the order of :func:`right_pad_order` back at their places."""
    return torch.empty_like(moved).scatter(1, order, moved)
