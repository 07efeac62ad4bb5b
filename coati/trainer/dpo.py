"""Direct preference optimization and its family: a pairwise loss of policy and reference
log-probs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coati.models.head import scatter_token_logprobs
from coati.models.loss import masked_mean, masked_sum
from coati.models.pairwise_loss import Pair, PairwiseObjective
from coati.parallel.engine import Engine
from coati.parallel.inference_model import InferenceModel
from coati.parallel.objective import Batch, Step
from coati.trainer.monitor.preference_checks import moments
from coati.trainer.preference import (
    PreferenceTrainer,
    RowLogps,
    in_order,
    interleave,
    sides,
    supervised,
)

# How far the first loss may be from what a policy that is its reference has, relative to it, by
# precision.
TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2, "fp16": 1e-2}


class DPOTrainer(PreferenceTrainer):
    """Takes what ``booster.boost`` returned, or an :class:`~coati.parallel.engine.Engine`.

    Args: ref_model: a plain frozen model; or ``reference``, a
        :class:`~coati.parallel.inference_model.InferenceModel`. Without either, batches hold
        ``chosen_reference`` and ``reject_reference`` (B,), sums over tokens, or there is no
        reference. loss_type: a name of :data:`~coati.models.loss_registry.LOSS_TYPES`, or several
        with their ``loss_weights`` (default 1 each), among them perhaps "sft"; each loss's own beta
        and gamma hold where they are None. length_normalization: every loss reads means over a
        row's supervised tokens. sft_coef: a of + a x the mean negative log-prob of the chosen
        response's tokens. ld_alpha: of the longer response of a pair, tokens beyond the shorter's
        length count this much.
        starts_at_reference: the policy is the reference at step 0, so the first loss is known and
        checked.
    """

    name = "dpo"

    def __init__(
        self,
        actor: torch.nn.Module | None = None,
        ref_model: torch.nn.Module | None = None,
        booster: Any = None,
        actor_optim: Any = None,
        plugin: Any = None,
        actor_lr_scheduler: Any = None,
        tokenizer: Any = None,
        max_epochs: int = 1,
        beta: float | None = None,
        gamma: float | None = None,
        length_normalization: bool = False,
        *,
        engine: Engine | None = None,
        reference: InferenceModel | None = None,
        loss_type: str | Sequence[str] = "dpo_loss",
        loss_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        sft_coef: float = 0.0,
        ld_alpha: float | None = None,
        starts_at_reference: bool = False,
        **keywords: Any,
    ) -> None:
        super().__init__(
            engine or Engine(booster, actor, actor_optim, actor_lr_scheduler),
            max_epochs,
            **keywords,
        )
        self.pairwise = PairwiseObjective.of(
            loss_type,
            loss_weights,
            beta=beta,
            gamma=gamma,
            label_smoothing=label_smoothing,
            length_normalization=length_normalization,
            sft_coef=sft_coef,
        )
        self.row_logps = RowLogps(ld_alpha=ld_alpha)
        self.reference = reference if ref_model is None else InferenceModel.plain(ref_model)
        self.starts_at_reference = starts_at_reference

    def prepare(self, batch: Batch) -> Batch:
        rows = super().prepare(batch)
        if self.reference is not None and "reference" not in rows:
            rows["reference"] = self.reference.rows(rows, self.row_logps)
        return rows

    def loss(self, outputs: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        tokens, mask = scatter_token_logprobs(outputs["logits"], batch["labels"]), supervised(batch)
        scores = self.row_logps(tokens, mask)
        ref = batch["reference"] if "reference" in batch else torch.zeros_like(scores)
        counted = batch["counted"][0::2]
        pair = Pair(*sides(scores), *sides(ref), *sides(mask.sum(1)))
        losses = self.pairwise(pair, -masked_mean(tokens, mask, 1)[0::2])
        term = self.pairwise.primary
        seen = term.view(pair)
        chosen, rejected = (term.settings.beta * ratio.detach() for ratio in (seen.c, seen.r))
        lp_chosen, lp_rejected = sides(masked_sum(tokens, mask, 1).detach())
        rewards = interleave(chosen, rejected)[batch["counted"]]
        metrics = {
            "chosen_rewards": chosen[counted],
            "rejected_rewards": rejected[counted],
            "margin": (chosen - rejected)[counted],
            "accuracy": in_order(chosen, rejected)[counted],
            "lp_chosen": lp_chosen[counted],
            "lp_rejected": lp_rejected[counted],
            **moments(rewards, mask.sum(1)[batch["counted"]]),
        }
        return masked_sum(losses, counted), metrics

    def observe(self, step: Step) -> list[str]:
        return [*self._first_loss(step), *super().observe(step)]

    def _first_loss(self, step: Step) -> list[str]:
        """At the first step, how its loss differs from that of a policy that is its reference, and
        the likely cause."""
        wanted = self.pairwise.at_reference()
        known = self.starts_at_reference and wanted is not None
        if self.state.step != 1 or not known or not step.num_terms:
            return []
        if abs(step.loss - wanted) <= TOLERANCE[self.engine.options.precision or "fp32"] * wanted:
            return []
        if self.reference is None:
            cause = "the stored reference log-probs are of another model, template or precision; remove their file"
        elif self.engine.options.lora:
            cause = "adapters that do not start at zero, or dropout in the model's own code"
        else:
            cause = (
                "dropout in the model's own code, or a reference from other weights than --pretrain"
            )
        return [
            f"the first loss is {step.loss:.4f}, a policy that is its own reference has "
            f"{wanted:.4f}: policy and "
            f"reference differ before anything is trained. Likely: {cause}"
        ]
