"""Odds-ratio preference optimization (arXiv 2403.07691): supervised loss and odds ratio in one,
without a reference."""

from typing import Any

import torch
from torch import Tensor

from coati.models.head import scatter_token_logprobs
from coati.models.loss import masked_mean, masked_sum, odds_ratio_loss
from coati.parallel.engine import Engine
from coati.parallel.objective import Batch
from coati.trainer.monitor.preference_checks import moments
from coati.trainer.preference import PreferenceTrainer, in_order, sides, supervised


class ORPOTrainer(PreferenceTrainer):
    """Takes what ``booster.boost`` returned, or an :class:`~coati.parallel.engine.Engine`. ``lam``:
    the weight of the odds ratio beside the mean negative log-prob of the chosen answer."""

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
        **keywords: Any,
    ) -> None:
        super().__init__(
            engine or Engine(booster, actor, actor_optim, actor_lr_scheduler),
            max_epochs,
            **keywords,
        )
        self.lam = lam

    def loss(self, outputs: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        tokens, mask = scatter_token_logprobs(outputs["logits"], batch["labels"]), supervised(batch)
        means, both, counted = (
            masked_mean(tokens, mask, 1),
            batch["counted"],
            batch["counted"][0::2],
        )
        chosen, rejected = sides(means)
        penalty, ratio = odds_ratio_loss(chosen, rejected)
        sums = sides(masked_sum(tokens, mask, 1).detach())
        metrics = {
            "chosen_rewards": chosen[counted],
            "rejected_rewards": rejected[counted],
            "margin": (chosen - rejected)[counted],
            "accuracy": in_order(chosen, rejected)[counted],
            "log_odds_ratio": ratio[counted],
            "lp_chosen": sums[0][counted],
            "lp_rejected": sums[1][counted],
            **moments(means[both], mask.sum(1)[both]),
        }
        return masked_sum(-chosen + self.lam * penalty, counted), metrics
