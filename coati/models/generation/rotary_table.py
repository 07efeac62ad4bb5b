"""Rotary angles of decoding, looked up instead of computed for every token."""

from typing import Any

import torch
from torch import Tensor

# Whose frequencies do not depend on how long the text is.
_FIXED = ("default", "linear", "llama3", "yarn")
_CHUNK = 512  # positions that are computed at a time, so that growing changes no bit


class RotaryTable:
    """Cosines and sines of ``rotary``, a model's rotary embedding, the first half of the sines
    negated: then x cos + swap_halves(x) sin rotates."""

    def __init__(self, rotary: Any) -> None:
        self.rotary = rotary
        self._fixed = getattr(rotary, "rope_type", None) in _FIXED
        self._table: Tensor | None = None

    def __call__(self, positions: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Both (rows, 1, D) for ``positions`` (rows,), of the type and device of ``hidden``."""
        if not self._fixed:
            cos, sin = self._computed(positions[:, None], hidden).unbind(2)
            return cos, sin
        table = self._reaching(int(positions.max()), hidden)
        found = table.index_select(0, positions)
        return found[:, :1], found[:, 1:]

    def _reaching(self, largest: int, hidden: Tensor) -> Tensor:
        """(n, 2, D): of all positions up to ``largest``."""
        held = 0 if self._table is None else len(self._table)
        if self._table is None or held <= largest:
            parts = [] if self._table is None else [self._table]
            for first in range(held, largest + 1, _CHUNK):
                chunk = torch.arange(first, first + _CHUNK, device=hidden.device)[None]
                parts.append(self._computed(chunk, hidden)[0])
            self._table = torch.cat(parts)
        return self._table

    def _computed(self, positions: Tensor, hidden: Tensor) -> Tensor:
        """(rows, n, 2, D) for ``positions`` (rows, n)."""
        cos, sin = self.rotary(hidden, positions)
        half = cos.shape[-1] // 2
        return torch.stack([cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)], dim=2)
