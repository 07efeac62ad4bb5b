"""The reward model: the chosen answer of a pair is to have the higher score."""

from typing import Any

import torch
from torch import Tensor

from coati.models.loss import centering, masked_sum, reward_loss
from coati.parallel.engine import Engine
from coati.parallel.objective import Batch, Step
from coati.trainer.monitor.preference_checks import moments
from coati.trainer.monitor.reward_model_report import verdict
from coati.trainer.preference import PreferenceTrainer, in_order, sides


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
        **keywords: Any,
    ) -> None:
        super().__init__(
            engine or Engine(booster, model, optimizer, lr_scheduler), max_epochs, **keywords
        )
        self.loss_fn, self.center_coef = reward_loss(loss_fn), center_coef
        self.last_scores: tuple[Tensor, Tensor] | None = (
            None  # of the last evaluation's pairs: chosen, rejected
        )

    def prepare(self, batch: Batch) -> Batch:
        rows = super().prepare(batch)
        del rows["labels"]  # there is no vocabulary head to choose tokens from
        return rows

    def loss(self, outputs: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        counted = batch["counted"][0::2]
        chosen, rejected = sides(outputs)
        margin = batch["margin"][0::2] if "margin" in batch else 0.0
        losses = self.loss_fn(chosen, rejected, margin)
        if self.center_coef:
            losses = losses + self.center_coef * centering(chosen, rejected)
        lengths = batch["attention_mask"].sum(1)[batch["counted"]]
        metrics = {
            "acc": in_order(chosen, rejected)[counted],
            "reward_chosen": chosen[counted],
            "reward_rejected": rejected[counted],
            "dist": (chosen - rejected)[counted],
            **moments(outputs[batch["counted"]], lengths),
        }
        return masked_sum(losses, counted), metrics

    def evaluation_metrics(self, step: Step) -> dict[str, float]:
        if step.metrics.get("reward_chosen"):
            self.last_scores = tuple(
                torch.cat(step.metrics[f"reward_{side}"]) for side in ("chosen", "rejected")
            )
        return super().evaluation_metrics(step)

    def verdict(self) -> list[str]:
        """:func:`~coati.trainer.monitor.reward_model_report.verdict` of the last evaluation; empty
        without one."""
        return [] if self.last_scores is None else verdict(*self.last_scores)
