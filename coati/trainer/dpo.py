"""Direct preference optimization and its family: a pairwise loss of policy and reference
log-probs."""

from typing import Any

import torch
from torch import Tensor

from coati.models.head import scatter_token_logprobs
from coati.models.loss import PairwiseSettings, masked_mean, masked_sum, pairwise_loss
from coati.models.loss_registry import LOSS_TYPES
from coati.parallel.engine import Engine
from coati.parallel.inference_model import InferenceModel
from coati.parallel.objective import Batch, Metrics, Step
from coati.trainer.preference import (
    PreferenceObjective,
    PreferenceTrainer,
    RowLogps,
    pair_metrics,
    sides,
    supervised,
)

# Relative tolerance of the first loss against that of a policy that is its reference.
TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2, "fp16": 1e-2}


class DPOObjective(PreferenceObjective):
    """A pairwise loss of policy and reference log-probs.

    Args:
        reference: the reference model; None where batches hold ``chosen_reference`` and
            ``reject_reference`` (B,), or where there is no reference.
        loss_type: a name of :data:`~coati.models.loss_registry.LOSS_TYPES`, whose beta and gamma
            hold where these are None.
        length_normalization: log-probs are means over a row's supervised tokens.
        sft_coef: a of + a x the mean negative log-prob of the chosen response.
        ld_alpha: of the longer response of a pair, tokens beyond the shorter's length count this
            much (LD-DPO).
        apply_loss_mask: False supervises every token the attention mask shows.
    """

    def __init__(
        self,
        reference: InferenceModel | None = None,
        loss_type: str = "dpo_loss",
        beta: float | None = None,
        gamma: float | None = None,
        label_smoothing: float = 0.0,
        length_normalization: bool = False,
        sft_coef: float = 0.0,
        ld_alpha: float | None = None,
        apply_loss_mask: bool = True,
    ) -> None:
        super().__init__(apply_loss_mask)
        row = LOSS_TYPES[loss_type]
        self.reference = reference
        self.loss_type = loss_type
        self.settings = PairwiseSettings(
            row.beta if beta is None else beta,
            row.gamma if gamma is None else gamma,
            label_smoothing,
        )
        self.row_logps = RowLogps(row.averaged or length_normalization, ld_alpha)
        self.pairwise = pairwise_loss(loss_type)
        self.sft_coef = sft_coef

    def prepare(self, batch: Batch) -> Batch:
        """Adds ``reference`` (2B,), the reference's log-probs of the rows."""
        rows = super().prepare(batch)
        if self.reference is not None and "reference" not in rows:
            rows["reference"] = self.reference.forward_only(rows, self.row_logps.read)
        return rows

    def loss(self, logps: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        """Sum over pairs; rewards are beta (log pi - log reference)."""
        tokens = scatter_token_logprobs(logps, batch["labels"])  # (2B, S - 1)
        mask = supervised(batch)
        counted = batch["counted"]
        log_ratios = self.row_logps(tokens, mask)
        if "reference" in batch:
            log_ratios = log_ratios - batch["reference"]
        chosen, rejected = sides(log_ratios)
        losses = self.pairwise(chosen - rejected, self.settings)
        if self.sft_coef:
            losses = losses - self.sft_coef * masked_mean(tokens, mask, 1)[0::2]
        rewards = self.settings.beta * log_ratios.detach()
        metrics = pair_metrics(rewards, tokens, mask, counted)
        return masked_sum(losses, counted[0::2]), metrics

    def loss_at_reference(self) -> float | None:
        """What a pair costs a policy that is its reference; None where that is not known."""
        expected = LOSS_TYPES[self.loss_type].at_reference
        if expected is None or self.settings.gamma or self.sft_coef:
            return None
        return expected(self.settings.beta)


class DPOTrainer(PreferenceTrainer):
    """Takes what ``booster.boost`` returned, or an :class:`~coati.parallel.engine.Engine`.

    Args:
        ref_model: a plain frozen model; or ``reference``, an
            :class:`~coati.parallel.inference_model.InferenceModel`.
        starts_at_reference: the policy is the reference at step 0, so the first loss is known and
            checked.

    The others are those of :class:`DPOObjective` and of :class:`~coati.trainer.base.SLTrainer`.
    """

    name = "dpo"
    objective: DPOObjective

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
        loss_type: str = "dpo_loss",
        label_smoothing: float = 0.0,
        sft_coef: float = 0.0,
        ld_alpha: float | None = None,
        apply_loss_mask: bool = True,
        starts_at_reference: bool = False,
        **keywords: Any,
    ) -> None:
        objective = DPOObjective(
            reference if ref_model is None else InferenceModel.plain(ref_model),
            loss_type,
            beta,
            gamma,
            label_smoothing,
            length_normalization,
            sft_coef,
            ld_alpha,
            apply_loss_mask,
        )
        engine = engine or Engine(booster, actor, actor_optim, actor_lr_scheduler)
        super().__init__(engine, objective, max_epochs, **keywords)
        self.starts_at_reference = starts_at_reference

    def diagnose(self, step: Step) -> list[str]:
        return [*self._first_loss(step), *super().diagnose(step)]

    def _first_loss(self, step: Step) -> list[str]:
        """At the first step, how its loss differs from that of a policy that is its reference, and
        the likely cause."""
        wanted = self.objective.loss_at_reference()
        if self.state.step != 1 or not self.starts_at_reference or wanted is None:
            return []
        tolerance = TOLERANCE[self.engine.options.precision or "fp32"] * wanted
        if not step.num_terms or abs(step.loss - wanted) <= tolerance:
            return []
        if self.objective.reference is None:
            cause = (
                "the stored reference log-probs are of another model, template or precision; remove "
                "their file"
            )
        elif self.engine.options.lora:
            cause = "adapters that do not start at zero, or dropout in the model's own code"
        else:
            cause = (
                "dropout in the model's own code, or a reference from other weights than --pretrain"
            )
        return [
            f"the first loss is {step.loss:.4f}, a policy that is its own reference has "
            f"{wanted:.4f}: policy and reference differ before anything is trained. Likely: {cause}"
        ]
