"""Batches without padding: the rows of a batch laid end to end, each attending to itself alone.

Position ids start anew at every row and attention runs row by row, so each token sees exactly what
it sees in a padded batch; linear layers, norms and the vocabulary head get real tokens only. The
model's code is left alone: transformers hands ``cu_seq_lens_q`` (the ends of the rows) down to its
attention function, which flash-attention already obeys and which "sdpa" is taught for CPUs
(attention.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coati.models.block_mask import sliding_window
from coati.models.logprobs import IGNORE_INDEX, next_token_targets
from coati.models.sdpa import patch_sdpa

_PROBE_LENGTHS = (3, 5)


@dataclass(frozen=True)
class Packed:
    """One batch as one row of T real tokens: what the model is called with, and what the head is
    set to."""

    inputs: dict[str, Any]
    targets: Tensor  # (1, T), for Head.set_targets


@dataclass(frozen=True)
class PaddingFree:
    """Lays batches end to end for one model; made by :meth:`of`. ``longest``: a longer row stays
    padded."""

    longest: int

    @classmethod
    def of(cls, model: nn.Module) -> "PaddingFree | None":
        """None where ``model`` must be given padded batches.

        It can be given packed ones when its attention runs through transformers' attention
        interface, with "sdpa" on a CPU or "flash_attention_2" on a GPU, and two packed probe rows
        come out as each does alone.
        """
        attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
        device = next(model.parameters()).device.type
        known = (attention, device) in (("sdpa", "cpu"), ("flash_attention_2", "cuda"))
        if not (known and getattr(model, "_supports_attention_backend", False)):
            return None
        if attention == "sdpa":
            patch_sdpa()
        # Rows longer than a sliding window are masked by it, which row_by_row does not do.
        packing = cls(longest=sliding_window(model.config) or 2**62)
        return (
            packing if packing.longest > max(_PROBE_LENGTHS) and packing._holds_for(model) else None
        )

    def pack(self, batch: Mapping[str, Tensor]) -> Packed | None:
        """(B, S) ``input_ids, attention_mask`` and perhaps ``labels`` -> one row of the
        ``attention_mask.sum()`` real tokens, in the same order, whatever side the padding is on;
        None where a row is too long. With ``position_ids`` (B, S) each row of the batch holds
        several, which begin where these are 0.

        Log-probs that a head returns for it are those it returns for the padded batch.
        """
        ids, real = batch["input_ids"], batch["attention_mask"].bool()
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
        return Packed(inputs, targets[real][None])

    @torch.no_grad()
    def _holds_for(self, model: nn.Module) -> bool:
        # A model may take the keywords and not act on them.
        device, training = next(model.parameters()).device, model.training
        width = max(_PROBE_LENGTHS)
        ids = (
            torch.arange(len(_PROBE_LENGTHS) * width, device=device).view(-1, width)
            % model.config.vocab_size
        )
        mask = (torch.arange(width) < torch.tensor(_PROBE_LENGTHS)[:, None]).long().to(device)
        # A model with a scalar head names its backbone; through peft the prefix leads to the whole
        # model.
        backbone = getattr(model, "backbone", None) or getattr(model, model.base_model_prefix, None)
        model.eval()
        try:
            packed = backbone(
                **self.pack({"input_ids": ids, "attention_mask": mask}).inputs, use_cache=False
            )[0]
            # Without dropout too: with it the answer would be chance, and a resumed run could take
            # the other way.
            rows = zip(ids, _PROBE_LENGTHS, strict=True)
            single = [
                backbone(input_ids=row[None, :length], use_cache=False)[0] for row, length in rows
            ]
        except TypeError:  # a forward without these keywords
            return False
        finally:
            model.train(training)
        alone = torch.cat(single, dim=1)
        tolerance = 1e-5 if packed.dtype == torch.float32 else 2e-2
        return bool((packed - alone).abs().max() <= tolerance * alone.abs().max())
