"""Padding-free batches: varlen attention over the rows of a batch, concatenated.

Position ids restart at every row and attention runs row by row, so each token sees exactly what
it sees in a padded batch; linear layers, norms and the vocabulary head get real tokens only. The
model's code is left alone: transformers hands ``cu_seq_lens_q`` (the ends of the rows) down to its
attention function, which flash-attention already obeys and sdpa.py adds to "sdpa" on CPUs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coati.models.block_mask import PROBE_LENGTHS, rows_stay_apart, sliding_window
from coati.models.logprobs import IGNORE_INDEX, next_token_targets
from coati.models.sdpa import patch_sdpa


@dataclass(frozen=True)
class Unpadded:
    """The T real tokens of a batch as one row: the model's inputs, and targets for the head."""

    inputs: dict[str, Any]
    targets: Tensor  # (1, T), for Head.set_targets


@dataclass(frozen=True)
class PaddingFree:
    """Concatenates the rows of a batch for one model; made by :meth:`of`. ``longest``: a batch with
    a longer row stays padded."""

    longest: int

    @classmethod
    def of(cls, model: nn.Module) -> "PaddingFree | None":
        """None if ``model`` needs padded batches.

        It does not if its attention runs through transformers' attention interface, with "sdpa" on
        a CPU or "flash_attention_2" on a GPU, and two concatenated probe rows give the outputs that
        each gives alone.
        """
        attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
        device = next(model.parameters()).device.type
        known = (attention, device) in (("sdpa", "cpu"), ("flash_attention_2", "cuda"))
        if not (known and getattr(model, "_supports_attention_backend", False)):
            return None
        if attention == "sdpa":
            patch_sdpa()
        # varlen_attention does not apply a sliding window, so no row may be longer than it.
        padding_free = cls(longest=sliding_window(model.config) or 2**62)
        if padding_free.longest <= max(PROBE_LENGTHS):
            return None
        # A model may accept the keywords and ignore them.
        return padding_free if rows_stay_apart(model, padding_free._probe) else None

    def unpad(self, batch: Mapping[str, Tensor]) -> Unpadded | None:
        """(B, S) ``input_ids, attention_mask`` and perhaps ``labels`` -> one row of the
        ``attention_mask.sum()`` real tokens, in the same order, whatever side the padding is on;
        None where a row is too long. With ``position_ids`` (B, S) each row of the batch holds
        several, which begin where these are 0.

        Log-probs that a head returns for it are those it returns for the padded batch.
        """
        ids = batch["input_ids"]
        real = batch["attention_mask"].bool()
        positions = batch.get("position_ids")
        positions = (real.cumsum(1) - 1 if positions is None else positions)[real]
        longest = int(positions.max()) + 1
        if longest > self.longest:
            return None
        targets = (
            next_token_targets(batch["labels"])
            if "labels" in batch
            else torch.full_like(ids, IGNORE_INDEX)
        )
        ends = F.pad((positions == 0).nonzero()[:, 0], (0, 1), value=len(positions)).to(torch.int32)
        inputs = {
            "input_ids": ids[real][None],
            "position_ids": positions[None],
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": longest,
            "max_length_k": longest,
        }
        return Unpadded(inputs, targets[real][None])

    def _probe(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        return self.unpad({**batch, "attention_mask": torch.ones_like(batch["input_ids"])}).inputs
