"""Kahneman-Tversky optimization (arXiv 2402.01306): single responses, each labeled desirable or
undesirable."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from coati.dataset.load.collator import supervise_all
from coati.models.head import scatter_token_logprobs
from coati.models.loss import kto_baseline, kto_loss, masked_sum
from coati.parallel.engine import Engine
from coati.parallel.inference_model import InferenceModel
from coati.parallel.objective import Batch, Metrics, Objective
from coati.trainer.monitor.preference_diagnostics import moments
from coati.trainer.preference import PreferenceTrainer, RowLogps, supervised, with_labels
from coati.utils.logging import get_logger
from coati.utils.meter import MaskedSamples

logger = get_logger(__name__)


class KTOObjective(Objective):
    """The KTO loss; rows with an empty loss mask are ignored.

    Batches hold ``input_ids, attention_mask, loss_mask`` (B, S), ``label`` (B,) and the same
    prompts with another row's response as ``kl_input_ids, kl_attention_mask, kl_loss_mask`` (B, K).

    Args:
        engine: of the policy, whose log-probs of the mismatched rows make the baseline z.
        reference: the reference model.
        desirable_weight, undesirable_weight: w_d, w_u.
        apply_loss_mask: False supervises every token the attention mask shows.
    """

    def __init__(
        self,
        engine: Engine,
        reference: InferenceModel,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        apply_loss_mask: bool = True,
    ) -> None:
        self.engine = engine
        self.reference = reference
        self.beta = beta
        self.weights = (desirable_weight, undesirable_weight)
        self.apply_loss_mask = apply_loss_mask
        self.row_logps = RowLogps()
        self.evaluation_baseline = 0.0

    def engines(self) -> list[Any]:
        return [self.reference.engine]

    def prepare(self, batch: Batch) -> Batch:
        """Adds ``labels``, ``counted`` (B,) and the reference's log-probs of the rows,
        ``reference`` (B,)."""
        if not self.apply_loss_mask:
            batch = supervise_all(batch)
        mask = batch["loss_mask"].bool()
        rows = with_labels(batch["input_ids"], batch["attention_mask"], mask)
        rows |= {"label": batch["label"].bool(), "counted": mask.any(1)}
        rows["reference"] = self.reference.forward_only(rows, self.row_logps.read, rows_together=1)
        return rows | {key: value for key, value in batch.items() if key.startswith("kl_")}

    def prepare_step(self, micro_batches: list[Batch]) -> list[Batch]:
        """z of the global batch, before anything of it is learned: (B,) in every micro-batch."""
        baseline, rows = self.baseline_of(micro_batches)
        if rows == 0 and any(bool(batch["counted"].any()) for batch in micro_batches):
            logger.warning_once(
                "a global batch of one row has no mismatched response: KTO's baseline z is 0 "
                "there; use --batch_size 2"
            )
        return [
            batch | {"baseline": torch.full_like(batch["reference"], baseline)}
            for batch in micro_batches
        ]

    @torch.no_grad()
    def baseline_of(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """z over ``batches`` of all ranks, and the mismatched rows it is a mean of."""
        total = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        count = torch.zeros_like(total)
        for batch in batches:
            if not self.apply_loss_mask:
                batch = supervise_all(batch)
            ids, real, mask = (
                batch[f"kl_{name}"] for name in ("input_ids", "attention_mask", "loss_mask")
            )
            rows = with_labels(ids, real, mask)
            policy = self.engine.forward_only(rows, self.row_logps.read, rows_together=1)
            reference = self.reference.forward_only(rows, self.row_logps.read, rows_together=1)
            counted = mask.bool().any(1).to(policy.device)
            total += masked_sum(policy - reference.to(policy.device), counted)
            count += counted.sum()
        reduced, rows_of_all = self.engine.sum_over_dp([total, count])
        return kto_baseline(reduced, rows_of_all), int(rows_of_all)

    def num_terms(self, batch: Batch) -> Tensor:
        """Rows that count."""
        return batch["counted"].sum()

    def loss(self, logps: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        """Sum over rows; rewards are beta (log pi - log reference)."""
        tokens = scatter_token_logprobs(logps, batch["labels"])  # (B, S - 1)
        mask = supervised(batch)
        counted = batch["counted"]
        label = batch["label"]
        log_ratios = self.row_logps(tokens, mask) - batch["reference"]
        detached = log_ratios.detach()
        baseline = batch.get("baseline", torch.full_like(detached, self.evaluation_baseline))
        losses = kto_loss(log_ratios, label, baseline, self.beta, *self.weights)
        rewards = self.beta * detached
        right = ((detached > baseline) == label).float()
        metrics: Metrics = {
            "chosen_rewards": MaskedSamples(rewards, label & counted),
            "rejected_rewards": MaskedSamples(rewards, ~label & counted),
            "kl": MaskedSamples(baseline, counted),
            "accuracy": MaskedSamples(right, counted),
        }
        metrics |= moments(rewards, mask.sum(1), counted)
        return masked_sum(losses, counted), metrics


class KTOTrainer(PreferenceTrainer):
    """Takes what ``booster.boost`` returned, or an :class:`~coati.parallel.engine.Engine`.

    Args:
        ref_model: a plain frozen model; or ``reference``, an
            :class:`~coati.parallel.inference_model.InferenceModel`.

    The others are those of :class:`KTOObjective` and of :class:`~coati.trainer.base.SLTrainer`.

    Raises:
        ValueError: without a reference model.
    """

    name = "kto"
    unit_name = "rows"
    ln2_is_chance = False
    objective: KTOObjective

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
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        *,
        engine: Engine | None = None,
        reference: InferenceModel | None = None,
        apply_loss_mask: bool = True,
        **keywords: Any,
    ) -> None:
        if reference is None and ref_model is None:
            raise ValueError("KTO needs a reference model: pass ref_model, or reference")
        engine = engine or Engine(booster, actor, actor_optim, actor_lr_scheduler)
        objective = KTOObjective(
            engine,
            reference or InferenceModel.plain(ref_model),
            beta,
            desirable_weight,
            undesirable_weight,
            apply_loss_mask,
        )
        super().__init__(engine, objective, max_epochs, **keywords)

    def before_evaluation(self, eval_dataloader: Any) -> None:
        self.objective.evaluation_baseline, _ = self.objective.baseline_of(eval_dataloader)

    def derive_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        if {"chosen_rewards", "rejected_rewards"} <= set(metrics):
            metrics = metrics | {"margin": metrics["chosen_rewards"] - metrics["rejected_rewards"]}
        return metrics
