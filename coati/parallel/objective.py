"""The interface between an algorithm and the engine (:class:`Objective`), and the result of an
optimizer step."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from coati.models.head_outputs import HeadRequest
from coati.models.logprobs import IGNORE_INDEX
from coati.utils.errors import RunFailed
from coati.utils.meter import MaskedSamples

Batch = dict[str, Tensor]
Metrics = dict[str, Tensor | MaskedSamples]
# Every other key is padded with 0, where the attention mask is 0 too.
PADDING = {"labels": IGNORE_INDEX}
# What only batches have in which not all count alike: 1 in the others.
WEIGHTS = {"loss_weights": "labels", "weight": "counted"}  # key -> the key of its shape


class Objective:
    """A loss and what it needs. A subclass must define :meth:`loss`.

    ``model_keys``: the keys of a batch that the model is called with. ``temperature``: log-probs
    are those of log_softmax(logits / temperature). ``rows_together``: consecutive rows of a
    prepared batch that the loss compares, which stay in one micro-batch (a pair: 2).
    """

    model_keys: tuple[str, ...] = ("input_ids", "attention_mask")
    temperature: float = 1.0
    rows_together: int = 1

    def prepare(self, batch: Batch) -> Batch:
        """Preprocessing of one micro-batch without gradient, on the device of the data."""
        return batch

    def prepare_step(self, micro_batches: list[Batch]) -> list[Batch]:
        """Preprocessing that needs this rank's whole share of the global batch: all prepared
        micro-batches of an optimizer step, on the model's device, before the first forward."""
        return micro_batches

    def token_keys(self) -> tuple[str, ...]:
        """The keys of a prepared batch with an entry for each supervised token of ``labels``; all
        others have one for each row."""
        return ()

    def head_request(self, batch: Batch) -> HeadRequest | None:
        """What :meth:`loss` needs of the vocabulary distribution besides label log-probs (entropy,
        top-k, log-probs of given ids (n, K), ...); by default nothing."""
        return None

    def engines(self) -> list[Any]:
        """The engines of further models that :meth:`prepare` runs forward, a reference's say, for
        what is logged of a step's work; by default none."""
        return []

    def num_terms(self, batch: Batch) -> Tensor:
        """The number of terms (tokens, pairs, rows) that :meth:`loss` sums, or the sum of their
        weights, a scalar tensor; by default the supervised tokens of ``labels``."""
        return (batch["labels"][:, 1:] != IGNORE_INDEX).sum()

    def loss(self, logps: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        """The *sum* of the terms of a micro-batch, and metrics as samples, which are averaged over
        all ranks when they are logged.

        ``logps`` (n,): the log-probs of the n tokens supervised by ``labels`` (B, S), in the order
        of ``labels[:, 1:] != -100``; where :meth:`head_request` asks for more, a
        :class:`~coati.models.head_outputs.HeadOutputs` of (n,) and (n, K) tensors. Of a model with
        a scalar head: what it returns, (B,) scores or (B, S) values.
        """
        raise NotImplementedError(f"{type(self).__name__} must define its loss")


@dataclass(frozen=True)
class LossPart:
    """One part of a step's loss: its micro-batches, their objective, and its weight."""

    micro_batches: list[Batch]
    objective: Objective
    weight: float = 1.0


@dataclass
class Step:
    """The result of an optimizer step over all ranks: loss per term, terms (where they are weighted
    the sum of the weights), real tokens, whether a rank asked to stop. ``metrics`` are this rank's
    samples, on the model's device in training; ``aux_losses`` the loss per term of each further
    part."""

    loss: float
    num_terms: float
    tokens: int = 0
    stop: bool = False
    grad_norm: float | None = None
    metrics: dict[str, list[Any]] = field(default_factory=dict)
    aux_losses: list[float] = field(default_factory=list)


class NonFiniteLoss(RunFailed):
    """The loss of a step is NaN or infinite; the step was not applied."""


def concatenate(micro_batches: list[Batch]) -> Batch:
    """Micro-batches joined along the rows, each right-padded to the longest. Raises ValueError for
    a key that only some of them have, unless it holds weights, which are 1 in the others."""
    joined = {}
    for key in dict.fromkeys(key for batch in micro_batches for key in batch):
        parts = [_entries(batch, key) for batch in micro_batches]
        if parts[0].dim() == 2:
            width = max(part.shape[1] for part in parts)
            fill = PADDING.get(key, 0)
            parts = [F.pad(part, (0, width - part.shape[1]), value=fill) for part in parts]
        joined[key] = torch.cat(parts)
    return joined


def _entries(batch: Batch, key: str) -> Tensor:
    if key in batch:
        return batch[key]
    like = batch.get(WEIGHTS.get(key, ""))
    if like is None:
        raise ValueError(f"only some micro-batches of a step have {key}: give all of them one")
    return torch.ones(like.shape, dtype=torch.float32, device=like.device)
