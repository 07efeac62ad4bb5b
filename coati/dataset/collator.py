"""Rows of token ids to padded tensors. Padding knows lengths, never token values: the pad id may equal eos."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100


def pad(rows: Sequence[Sequence[int]], width: int, value: int, side: str = "right") -> Tensor:
    """(B, width) long tensor of ``rows``, each filled up with ``value`` on ``side``."""
    out = torch.full((len(rows), width), value, dtype=torch.long)
    for index, row in enumerate(rows):
        cells = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        out[index, cells] = torch.as_tensor(row, dtype=torch.long)
    return out


def attention_mask(lengths: Sequence[int], width: int, side: str = "right") -> Tensor:
    """(B, width) long tensor, 1 at the true tokens of rows of these ``lengths``."""
    position = torch.arange(width)
    if side == "left":
        position = position.flip(0)
    return (position[None] < torch.as_tensor(lengths)[:, None]).long()


class DataCollatorForSupervisedDataset:
    """Rows with ``input_ids`` and ``labels`` to ``input_ids, attention_mask, labels``, each (B, S).

    S is the longest row of the batch, at most ``max_length``, rounded up to ``pad_to_multiple_of``.

    Args:
        tokenizer: gives the pad id and the padding side ("right" is what training uses).
        max_length: longer rows are cut at the end.
        ignore_index: label of positions without loss.
        apply_loss_mask: False trains on every real token (never on padding).
    """

    def __init__(
        self,
        tokenizer,
        max_length: int = 4096,
        ignore_index: int = IGNORE_INDEX,
        *,
        apply_loss_mask: bool = True,
        pad_to_multiple_of: int = 1,
    ) -> None:
        pad_id = tokenizer.pad_token_id
        self.pad_id = pad_id if pad_id is not None else (tokenizer.eos_token_id or 0)
        self.side = tokenizer.padding_side
        self.max_length = max_length
        self.ignore_index = ignore_index
        self.apply_loss_mask = apply_loss_mask
        self.multiple = pad_to_multiple_of

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        ids = [row["input_ids"][: self.max_length] for row in rows]
        labels = [
            row["labels"][: self.max_length] if self.apply_loss_mask else row["input_ids"][: self.max_length]
            for row in rows
        ]
        lengths = [len(row) for row in ids]
        width = -(-max(lengths) // self.multiple) * self.multiple
        return {
            "input_ids": pad(ids, width, self.pad_id, self.side),
            "attention_mask": attention_mask(lengths, width, self.side),
            "labels": pad(labels, width, self.ignore_index, self.side),
        }

    def blank(self, row: dict[str, Any]) -> dict[str, Any]:
        """``row`` without anything supervised: keeps a rank in step that has no row left."""
        ids = row["input_ids"][:2]
        return {"input_ids": ids, "labels": [self.ignore_index] * len(ids)}
