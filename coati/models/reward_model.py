"""The reward model: one score per row, read at its last real token."""

from typing import Any

import torch
from torch import Tensor

from coati.models.base import BaseModel


class RewardModel(BaseModel):
    """Score = linear head on the hidden state of the last real token. Arguments as
    :class:`BaseModel`."""

    kind = "reward"
    task = "SequenceClassification"

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **keywords: Any,
    ) -> Tensor:
        """Scores (B,) fp32 of ``input_ids`` (B, S), whatever side ``attention_mask`` (B, S) says
        the padding is on.

        ``cu_seq_lens_q`` (B + 1,): the ends of concatenated rows in ``input_ids`` (1, T), see
        models/padding_free.py.
        """
        keywords.setdefault("use_cache", False)
        if cu_seq_lens_q is not None:
            hidden = self.backbone(input_ids=input_ids, cu_seq_lens_q=cu_seq_lens_q, **keywords)[0]
            return self.score(hidden[0, cu_seq_lens_q[1:].long() - 1])
        hidden, _ = self.states(input_ids, attention_mask, **keywords)
        rows = torch.arange(len(hidden), device=hidden.device)
        lengths = (
            attention_mask.sum(1)
            if attention_mask is not None
            else torch.full_like(rows, input_ids.shape[1])
        )
        return self.score(hidden[rows, (lengths - 1).clamp(min=0)])
