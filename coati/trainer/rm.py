"""The reward model: trained with a Bradley-Terry ranking loss on pairs of responses."""

from typing import Any

import torch
from torch import Tensor

from coati.models.loss import centering, reward_loss
from coati.parallel.engine import Engine
from coati.parallel.objective import Batch, Metrics, Step
from coati.trainer.monitor.preference_diagnostics import moments
from coati.trainer.monitor.reward_model_report import verdict
from coati.trainer.preference import (
    PreferenceObjective,
    PreferenceTrainer,
    deinterleave,
    pair_accuracy,
)
from coati.utils.meter import MaskedSamples


class RewardModelObjective(PreferenceObjective):
    """A ranking loss of the scores of a pair (arXiv 2203.02155, eq. 1).

    Args:
        loss_fn: a name of :data:`~coati.models.loss_registry.REWARD_LOSSES`.
        center_coef: c of + c (chosen + rejected)^2.
    """

    def __init__(
        self, loss_fn: str = "log_sig", center_coef: float = 0.0, apply_loss_mask: bool = True
    ) -> None:
        super().__init__(apply_loss_mask)
        self.loss_fn = reward_loss(loss_fn)
        self.center_coef = center_coef

    def prepare(self, batch: Batch) -> Batch:
        rows = super().prepare(batch)
        del rows["labels"]  # there is no vocabulary head to choose tokens from
        return rows

    def loss(self, scores: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        """``scores`` (2B,) of interleaved rows -> the sum over pairs."""
        counted = batch["counted"]
        pairs = counted[0::2]
        chosen, rejected = deinterleave(scores)
        margin = batch["margin"][0::2] if "margin" in batch else 0.0
        losses = self.loss_fn(chosen, rejected, margin)
        if self.center_coef:
            losses = losses + self.center_coef * centering(chosen, rejected)
        values = {
            "acc": pair_accuracy(chosen, rejected),
            "reward_chosen": chosen,
            "reward_rejected": rejected,
            "dist": chosen - rejected,
        }
        metrics: Metrics = {name: MaskedSamples(value, pairs) for name, value in values.items()}
        metrics |= moments(scores, batch["attention_mask"].sum(1), counted)
        return self.total(losses, batch), metrics


class RewardModelTrainer(PreferenceTrainer):
    """Takes what ``booster.boost`` returned, or an :class:`~coati.parallel.engine.Engine`.

    Args:
        loss_fn: "log_sig" or "log_exp", the same number.
        center_coef: c of + c (chosen + rejected)^2.
    """

    name = "rm"
    accuracy = "acc"

    def __init__(
        self,
        model: torch.nn.Module | None = None,
        booster: Any = None,
        optimizer: Any = None,
        plugin: Any = None,
        lr_scheduler: Any = None,
        tokenizer: Any = None,
        loss_fn: str = "log_sig",
        max_epochs: int = 1,
        *,
        engine: Engine | None = None,
        center_coef: float = 0.0,
        apply_loss_mask: bool = True,
        **keywords: Any,
    ) -> None:
        objective = RewardModelObjective(loss_fn, center_coef, apply_loss_mask)
        engine = engine or Engine(booster, model, optimizer, lr_scheduler)
        super().__init__(engine, objective, max_epochs, **keywords)
        # Of the pairs of the last evaluation: chosen, rejected.
        self.last_scores: tuple[Tensor, Tensor] | None = None

    def evaluation_metrics(self, step: Step) -> dict[str, float]:
        if step.metrics.get("reward_chosen"):
            chosen, rejected = (
                torch.cat(step.metrics[f"reward_{s}"]) for s in ("chosen", "rejected")
            )
            self.last_scores = chosen, rejected
        return super().evaluation_metrics(step)

    def report(self) -> list[str]:
        """:func:`~coati.trainer.monitor.reward_model_report.verdict` of the last evaluation; empty
        without one."""
        return [] if self.last_scores is None else verdict(*self.last_scores)
