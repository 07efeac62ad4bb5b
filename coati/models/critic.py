"""The critic: one value per token."""

from typing import Any

import torch
from torch import Tensor

from coati.models.base import BaseModel
from coati.models.logprobs import restore_order


class Critic(BaseModel):
    """Value of the state after each token. Its head starts at 0 unless it comes from a reward
    model."""

    kind = "critic"
    task = "TokenClassification"

    @torch.no_grad()
    def init_head(self) -> None:
        """Weight and bias 0: every state is worth 0 before training."""
        self.score.weight.zero_()
        self.score.bias.zero_()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        row_places: Tensor | None = None,
        **keywords: Any,
    ) -> Tensor:
        """Values (B, S) fp32, each at the place of its token in ``input_ids`` (B, S); meaningless
        at padding.

        With ``cu_seq_lens_q`` (concatenated rows in ``input_ids`` (1, T)): (1, T); with
        ``row_places`` (T,), the places of their tokens in ``input_ids`` (1, P), too.
        """
        keywords.setdefault("use_cache", False)
        if cu_seq_lens_q is not None:
            keywords |= {"attention_mask": attention_mask, "cu_seq_lens_q": cu_seq_lens_q}
            hidden = self.backbone(input_ids=input_ids, **keywords)[0]
            values = self.score(hidden)
            return values if row_places is None else values[:, row_places]
        hidden, order = self.states(input_ids, attention_mask, **keywords)
        return restore_order(self.score(hidden), order)
