"""Supervised fine-tuning: next-token cross-entropy on the supervised tokens."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from coati.dataset.load.collator import supervise_all
from coati.models.logprobs import IGNORE_INDEX
from coati.models.loss import check_terms, dynamic_finetuning_loss
from coati.models.loss_registry import NLL, SFT_LOSSES
from coati.parallel.engine import Batch, Engine, Step
from coati.parallel.objective import Metrics, Objective
from coati.trainer.base import SLTrainer

TokenLoss = Callable[[Tensor, Batch], Tensor]


class SFTObjective(Objective):
    """L = sum of -log p over the supervised tokens; the engine divides by their number in the
    global batch. Where a batch has ``loss_weights`` (B, S), L = sum of -w log p, and the engine
    divides by the sum of the weights: the same weight everywhere changes nothing.

    Args:
        apply_loss_mask: False supervises every token the attention mask shows; padding never.
        token_loss: another loss of each token: ``token_loss(logps, batch)`` gets the log-probs (n,)
            of the supervised tokens, in the order of ``batch["labels"][:, 1:] != -100``, and
            returns one loss (n,) for each. Or a name of
            :data:`~coati.models.loss_registry.SFT_LOSSES`. Beside another loss than the first the
            metric ``nll`` is -log p.
    """

    def __init__(
        self, apply_loss_mask: bool = True, token_loss: TokenLoss | str | None = None
    ) -> None:
        self.apply_loss_mask = apply_loss_mask
        self.token_loss = _named(token_loss) if isinstance(token_loss, str) else token_loss

    def prepare(self, batch: Batch) -> Batch:
        return batch if self.apply_loss_mask else supervise_all(batch)

    def num_terms(self, batch: Batch) -> Tensor:
        weights = token_weights(batch)
        return super().num_terms(batch) if weights is None else weights.double().sum()

    def loss(self, logps: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        losses = -logps
        metrics: Metrics = {}
        if self.token_loss is not None:
            metrics = {"nll": -logps}
            losses = self.token_loss(logps, batch)
            losses = check_terms(losses, logps.shape, "supervised token")
        weights = token_weights(batch)
        return (losses if weights is None else losses * weights).sum(), metrics


def _named(name: str) -> TokenLoss | None:
    """The loss of a name of :data:`~coati.models.loss_registry.SFT_LOSSES`; None for -log p."""
    if name not in SFT_LOSSES:
        raise ValueError(f"sft_loss {name!r}: choose from {', '.join(SFT_LOSSES)}")
    return None if name == NLL else {"dft": lambda logps, _: dynamic_finetuning_loss(logps)}[name]


def token_weights(batch: Batch) -> Tensor | None:
    """(n,) weights of the supervised tokens; None where all count alike."""
    if "loss_weights" not in batch:
        return None
    return batch["loss_weights"][:, 1:][batch["labels"][:, 1:] != IGNORE_INDEX]


class SFTTrainer(SLTrainer):
    """Takes what ``booster.boost`` returned, or an :class:`~coati.parallel.engine.Engine`::

        SFTTrainer(model, booster, optim, lr_scheduler, max_epochs=1).fit(train_dataloader)

    Args:
        apply_loss_mask: False supervises every token the attention mask shows; padding never.
        loss: another loss of each token; ``token_loss`` of :class:`SFTObjective`.
        keywords: of :class:`~coati.trainer.base.SLTrainer`.
    """

    name = "sft"

    def __init__(
        self,
        model: torch.nn.Module | None = None,
        booster: Any = None,
        optim: Any = None,
        lr_scheduler: Any = None,
        max_epochs: int = 2,
        accumulation_steps: int = 8,
        apply_loss_mask: bool = True,
        start_epoch: int = 0,
        save_interval: int | None = None,
        save_dir: str | None = None,
        coordinator: Any = None,
        *,
        engine: Engine | None = None,
        loss: TokenLoss | str | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(
            engine or Engine(booster, model, optim, lr_scheduler),
            SFTObjective(apply_loss_mask, loss),
            max_epochs,
            accumulation_steps=accumulation_steps,
            start_epoch=start_epoch,
            save_interval=save_interval,
            save_dir=save_dir,
            **keywords,
        )

    def evaluation_metrics(self, step: Step) -> dict[str, float]:
        # Of another loss than -log p the exponential is no perplexity.
        other = step.metrics.get("nll")
        nll = float(torch.cat(other).double().mean()) if other else step.loss
        return {"loss": step.loss, "perplexity": math.exp(min(nll, 700.0))}
