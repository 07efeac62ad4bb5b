"""Odds-ratio preference optimization (arXiv 2403.07691): supervised loss and odds ratio in one
stage, without a reference."""

from typing import Any

import torch
from torch import Tensor

from coati.models.head import scatter_token_logprobs
from coati.models.loss import masked_mean, odds_ratio_loss
from coati.parallel.engine import Engine
from coati.parallel.objective import Batch, Metrics
from coati.trainer.preference import (
    PreferenceObjective,
    PreferenceTrainer,
    deinterleave,
    pair_metrics,
    supervised,
)
from coati.utils.meter import MaskedSamples


class ORPOObjective(PreferenceObjective):
    """Mean negative log-prob of the chosen response - ``lam`` x log sigmoid of the log odds
    ratio."""

    def __init__(self, lam: float = 0.1, apply_loss_mask: bool = True) -> None:
        super().__init__(apply_loss_mask)
        self.lam = lam

    def loss(self, logps: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        """Sum over pairs; rewards are mean log-probs."""
        tokens = scatter_token_logprobs(logps, batch["labels"])  # (2B, S - 1)
        mask = supervised(batch)
        counted = batch["counted"]
        means = masked_mean(tokens, mask, 1)
        chosen, rejected = deinterleave(means)
        penalty, log_odds_ratio = odds_ratio_loss(chosen, rejected)
        metrics = pair_metrics(means, tokens, mask, counted)
        metrics["log_odds_ratio"] = MaskedSamples(log_odds_ratio, counted[0::2])
        return self.total(-chosen + self.lam * penalty, batch), metrics


class ORPOTrainer(PreferenceTrainer):
    """Takes what ``booster.boost`` returned, or an :class:`~coati.parallel.engine.Engine`. ``lam``:
    the weight of the odds ratio beside the mean negative log-prob of the chosen response."""

    name = "orpo"
    ln2_is_chance = False

    def __init__(
        self,
        actor: torch.nn.Module | None = None,
        booster: Any = None,
        actor_optim: Any = None,
        plugin: Any = None,
        actor_lr_scheduler: Any = None,
        tokenizer: Any = None,
        max_epochs: int = 1,
        lam: float = 0.1,
        *,
        engine: Engine | None = None,
        apply_loss_mask: bool = True,
        **keywords: Any,
    ) -> None:
        engine = engine or Engine(booster, actor, actor_optim, actor_lr_scheduler)
        super().__init__(engine, ORPOObjective(lam, apply_loss_mask), max_epochs, **keywords)
