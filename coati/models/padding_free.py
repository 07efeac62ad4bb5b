"""Padding-free batches: varlen attention over the rows of a batch, concatenated.

Position ids restart at every row and attention runs row by row, so each token sees exactly what
it sees in a padded batch; linear layers, norms and the vocabulary head get real tokens only. The
model's code is left alone: transformers hands ``cu_seq_lens_q`` (the ends of the rows) down to its
attention function, which flash-attention already obeys and sdpa.py adds to "sdpa".

On CPUs rows that begin alike may be given their common tokens once (prefix_layout.py): attention is
then told, besides, which tokens see which prefix. Flash-attention for GPUs has no such batches.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coati.models.block_mask import (
    PROBE_LENGTHS,
    draws_in_training,
    gives_outputs_of,
    rows_stay_apart,
    sliding_window,
)
from coati.models.flash_varlen import has_kernels
from coati.models.logprobs import IGNORE_INDEX, next_token_targets
from coati.models.prefix_layout import PrefixLayout, prefix_layout
from coati.models.sdpa import patch_sdpa
from coati.utils.logging import get_logger
from coati.utils.transformers_compat import masks_packs_itself, text_config

logger = get_logger(__name__)

# Tokens that rows must begin with alike: with fewer, further calls of attention cost more.
LEAST_PREFIX = 16
_PROBE_PREFIX = 3


@dataclass(frozen=True)
class Unpadded:
    """The T real tokens of a batch as one row: the model's inputs, and targets for the head.
    ``places`` (T,): where each token is in the inputs, if rows share some."""

    inputs: dict[str, Any]
    targets: Tensor  # (1, T), for Head.set_targets
    places: Tensor | None = None


@dataclass(frozen=True)
class PaddingFree:
    """Concatenates the rows of a batch for one model; made by :meth:`of`. ``longest``: a batch with
    a longer row stays padded. ``shares``, ``shares_in_training``: whether rows may share the tokens
    that they begin with, in evaluation and in training mode. ``blank_mask``: the model is given a
    mask of one element, which nothing reads, lest it make one of T x T that nothing reads either.
    """

    longest: int
    blank_mask: bool = False
    shares: bool = False
    shares_in_training: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> "PaddingFree | None":
        """None if ``model`` needs padded batches.

        It does not if its attention runs through transformers' attention interface, with "sdpa" or
        on a GPU with "flash_attention_2", and two concatenated probe rows give the outputs that
        each gives alone. On a GPU it must be where it will run, under the autocast of training.
        """
        attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
        device = next(model.parameters()).device.type
        if not (runs_varlen(attention, device) and _takes_keywords(model)):
            return None
        if attention == "sdpa":
            patch_sdpa()
        # varlen_attention does not apply a sliding window, so no row may be longer than it.
        padding_free = cls(longest=sliding_window(model.config) or 2**62)
        if padding_free.longest <= max(PROBE_LENGTHS):
            return None
        blank = replace(padding_free, blank_mask=True)
        if masks_packs_itself() and attention == "sdpa" and _takes_blank_mask(model, blank):
            padding_free = blank
        # A model may accept the keywords and ignore them.
        elif not _probed(model, padding_free):
            return None
        shares = (attention, device) == ("sdpa", "cpu") and _prefixes_hold(model, padding_free)
        in_training = shares and not draws_in_training(model)
        return replace(padding_free, shares=shares, shares_in_training=in_training)

    def _inputs(self, ids: Tensor, positions: Tensor, ends: Tensor, longest: int) -> dict[str, Any]:
        """Of a model, for one row of tokens (T,)."""
        inputs = {
            "input_ids": ids[None],
            "position_ids": positions[None],
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": longest,
            "max_length_k": longest,
        }
        if self.blank_mask:
            inputs["attention_mask"] = torch.zeros(1, 1, 1, 1, device=ids.device)
        return inputs

    def unpad(self, batch: Mapping[str, Tensor], share: bool = False) -> Unpadded | None:
        """(B, S) ``input_ids, attention_mask`` and perhaps ``labels`` -> one row of the
        ``attention_mask.sum()`` real tokens, in the same order, whatever side the padding is on;
        None where a row is too long. With ``position_ids`` (B, S) each row of the batch holds
        several, which begin where these are 0. ``share``: rows that begin alike share these tokens;
        only where the model :attr:`shares` them.

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
        tokens = ids[real]
        ends = F.pad((positions == 0).nonzero()[:, 0], (0, 1), value=len(positions)).to(torch.int32)
        layout = prefix_layout(tokens, ends.diff().tolist(), LEAST_PREFIX) if share else None
        if layout is not None:
            return self._shared(tokens, positions, targets[real], layout)
        return Unpadded(self._inputs(tokens, positions, ends, longest), targets[real][None])

    def _shared(
        self, tokens: Tensor, positions: Tensor, targets: Tensor, layout: PrefixLayout
    ) -> Unpadded:
        ends = torch.tensor(layout.ends, dtype=torch.int32)
        source = layout.source
        inputs = self._inputs(tokens[source], positions[source], ends, int(ends.diff().max()))
        inputs["shared_prefixes"] = torch.tensor(layout.prefixes, dtype=torch.int32).view(-1, 3)
        return Unpadded(inputs, targets[None], layout.places)

    def shared_probe(self, model: nn.Module) -> tuple[list[Tensor], Unpadded]:
        """Two rows with a common prefix, and both in one sequence."""
        size = text_config(model.config).vocab_size
        ids = torch.arange(_PROBE_PREFIX + sum(PROBE_LENGTHS)) % size
        prefix, *tails = ids.split([_PROBE_PREFIX, *PROBE_LENGTHS])
        rows = [torch.cat([prefix, tail]) for tail in tails]
        positions = torch.cat([torch.arange(len(row)) for row in rows])
        tokens = torch.cat(rows)
        layout = prefix_layout(tokens, [len(row) for row in rows], _PROBE_PREFIX)
        targets = torch.full_like(tokens, IGNORE_INDEX)
        return rows, self._shared(tokens, positions, targets, layout)

    def _probe(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        return self.unpad({**batch, "attention_mask": torch.ones_like(batch["input_ids"])}).inputs


def runs_varlen(attention: str | None, device: str) -> bool:
    """Whether there is varlen attention for this implementation on this type of device."""
    if device == "cuda":
        return attention == "flash_attention_2" or (attention == "sdpa" and has_kernels())
    return (attention, device) == ("sdpa", "cpu")


def _takes_keywords(model: nn.Module) -> bool:
    return getattr(model, "_supports_attention_backend", False)


def _takes_blank_mask(model: nn.Module, padding_free: PaddingFree) -> bool:
    # Outside what is probed: the experts' balance, which reads the mask, is computed from logits.
    if getattr(text_config(model.config), "output_router_logits", False):
        return False
    try:
        return rows_stay_apart(model, padding_free._probe)
    except (ValueError, RuntimeError, IndexError, AttributeError):  # something reads the mask
        return False


def _probed(model: nn.Module, padding_free: PaddingFree) -> bool:
    """Whether rows stay apart; on a GPU its kernels may not be able to run the model."""
    try:
        return rows_stay_apart(model, padding_free._probe)
    except RuntimeError as error:
        if not _can_lack_kernels(model):
            raise
        what = " ".join(str(error).split())[:200]
        logger.warning_once(f"batches are padded: varlen attention cannot run here ({what})")
        return False


def _can_lack_kernels(model: nn.Module) -> bool:
    return next(model.parameters()).device.type != "cpu"


def _prefixes_hold(model: nn.Module, padding_free: PaddingFree) -> bool:
    """Whether ``model`` gives rows that share a prefix the outputs of each alone."""
    rows, unpadded = padding_free.shared_probe(model)
    try:
        return gives_outputs_of(model, rows, unpadded.inputs, unpadded.places)
    except (ValueError, RuntimeError, IndexError):  # its attention has no block that can be merged
        return False
