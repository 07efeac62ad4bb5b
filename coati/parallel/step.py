"""What passes between a trainer and the engine: the hooks, and what came of a step."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

Batch = dict[str, Tensor]


class Hooks(Protocol):
    """What a trainer tells the engine about its algorithm.

    Optional besides: ``prepare_window(window) -> window``, called with the prepared batches of a training step on the
    device, in eval mode and without gradient, before the first forward; for what needs the whole window.
    """

    model_keys: tuple[str, ...]

    def prepare(self, batch: Batch) -> Batch:
        """Work without gradient before the forward."""

    def units(self, batch: Batch) -> Tensor:
        """How many terms (tokens, pairs, rows) ``loss`` adds up, a scalar tensor."""

    def loss(self, outputs: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The *sum* of the terms, and metrics as tensors of samples. ``outputs.logits`` (1, n) holds the log-probs of
        the tokens chosen by ``batch["labels"]``; a model with a scalar head gives its tensor instead."""


@dataclass
class Step:
    """What one optimiser step was, over all ranks: loss per unit, units, real tokens, whether a rank asked to stop; the
    samples in ``metrics`` are this rank's."""

    loss: float
    units: int
    tokens: int = 0
    stop: bool = False
    grad_norm: float | None = None
    metrics: dict[str, list[Tensor]] = field(default_factory=dict)


class NonFiniteLoss(RuntimeError):
    """The loss of a step is NaN or infinite; nothing was updated by it."""
