"""What passes between a trainer and the engine: the hooks, and what came of a step."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from coati.models.logprobs import IGNORE_INDEX

Batch = dict[str, Tensor]
PADDING = {
    "labels": IGNORE_INDEX
}  # every other key is padded with 0: attention masks say what counts


class Objective(Protocol):
    """What a trainer tells the engine about its algorithm.

    Optional besides: ``prepare_window(window) -> window``, called with the prepared batches of a
    training step on the device, in eval mode and without gradient, before the first forward; for
    what needs the whole window. And
    ``temperature``, where log-probs are wanted at another than the engine's.
    """

    model_keys: tuple[str, ...]

    def prepare(self, batch: Batch) -> Batch:
        """Work without gradient before the forward."""

    def num_terms(self, batch: Batch) -> Tensor:
        """How many terms (tokens, pairs, rows) ``loss`` adds up, a scalar tensor."""

    def loss(self, outputs: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The *sum* of the terms, and metrics as tensors of samples. ``outputs.logits`` (1, n)
        holds the log-probs of the tokens chosen by ``batch["labels"]``; a model with a scalar head
        gives its tensor instead."""


@dataclass(frozen=True)
class LossPart:
    """A share of a step's loss: the micro-batches and hooks it comes from, and how much it
    weighs."""

    window: list[Batch]
    hooks: Objective
    weight: float = 1.0


@dataclass
class Step:
    """What one optimizer step was, over all ranks: loss per unit, units, real tokens, whether a
    rank asked to stop; the samples in ``metrics`` are this rank's; ``also`` the loss per unit of
    each further part."""

    loss: float
    num_terms: int
    tokens: int = 0
    stop: bool = False
    grad_norm: float | None = None
    metrics: dict[str, list[Tensor]] = field(default_factory=dict)
    also: list[float] = field(default_factory=list)


class NonFiniteLoss(RuntimeError):
    """The loss of a step is NaN or infinite; nothing was updated by it."""


def concatenate(window: list[Batch]) -> Batch:
    """Micro-batches joined along the rows, each right-padded to the longest."""
    joined = {}
    for key in window[0]:
        parts = [batch[key] for batch in window]
        if parts[0].dim() == 2:
            width = max(part.shape[1] for part in parts)
            parts = [
                F.pad(part, (0, width - part.shape[1]), value=PADDING.get(key, 0)) for part in parts
            ]
        joined[key] = torch.cat(parts)
    return joined
