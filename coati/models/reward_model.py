"""The reward model: one score per row, read at its last real token."""

from typing import Any

import torch
import torch.nn.functional as F
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
        row_places: Tensor | None = None,
        **keywords: Any,
    ) -> Tensor:
        """Scores (B,) fp32 of ``input_ids`` (B, S), whatever side ``attention_mask`` (B, S) says
        the padding is on.

        ``cu_seq_lens_q`` (B + 1,): the ends of concatenated rows in ``input_ids`` (1, T), see
        models/padding_free.py. ``row_places`` (T,): the places there of the rows' tokens, where
        rows share them.
        """
        keywords.setdefault("use_cache", False)
        if cu_seq_lens_q is not None:
            keywords |= {"attention_mask": attention_mask, "cu_seq_lens_q": cu_seq_lens_q}
            hidden = self.backbone(input_ids=input_ids, **keywords)[0]
            last = cu_seq_lens_q[1:].long() - 1
            if row_places is not None:
                positions = keywords["position_ids"][0, row_places]
                last = row_places[F.pad(positions[1:] == 0, (0, 1), value=True)]
            return self.score(hidden[0, last])
        hidden, _ = self.states(input_ids, attention_mask, **keywords)
        rows = torch.arange(len(hidden), device=hidden.device)
        lengths = (
            attention_mask.sum(1)
            if attention_mask is not None
            else torch.full_like(rows, input_ids.shape[1])
        )
        return self.score(hidden[rows, (lengths - 1).clamp(min=0)])
