"""Kahneman-Tversky optimization (arXiv 2402.01306): single answers, each judged good or bad."""

from typing import Any

import torch
from torch import Tensor

from coati.models.head import scatter_token_logprobs
from coati.models.loss import kto_baseline, kto_loss, masked_sum
from coati.parallel.engine import Engine
from coati.parallel.inference_model import InferenceModel
from coati.parallel.objective import Batch, Step
from coati.trainer.base import RunSchedule, SLTrainer
from coati.trainer.monitor.preference_checks import PreferenceChecks, moments
from coati.trainer.preference import RowLogps, interval_of, marked, supervised
from coati.utils.logging import get_logger

logger = get_logger(__name__)


class KTOTrainer(SLTrainer):
    """Takes what ``booster.boost`` returned, or an :class:`~coati.parallel.engine.Engine`.

    Batches hold ``input_ids, attention_mask, loss_mask`` (B, S), ``label`` (B,) and the same
    prompts with another row's answer as ``kl_input_ids, kl_attention_mask, kl_loss_mask`` (B, K).
    Rows with nothing marked count for nothing.

    Args: ref_model: a plain frozen model; or ``reference``, a
        :class:`~coati.parallel.inference_model.InferenceModel`. desirable_weight, undesirable_weight:
        w_d, w_u.
    """

    name = "kto"
    unit_name = "rows"

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
        start_epoch: int = 0,
        save_interval: int | None = None,
        save_dir: str | None = None,
        plan: RunSchedule | None = None,
        **keywords: Any,
    ) -> None:
        plan = plan or RunSchedule(save_dir=save_dir, save_interval=save_interval or 0)
        engine = engine or Engine(booster, actor, actor_optim, actor_lr_scheduler)
        super().__init__(engine, max_epochs, plan=plan, **keywords)
        if reference is None and ref_model is None:
            raise ValueError("KTO needs a reference model: pass ref_model, or reference")
        self.state.epoch = max(self.state.epoch, start_epoch)
        self.reference = reference or InferenceModel.plain(ref_model)
        self.beta, self.weights, self.apply_loss_mask = (
            beta,
            (desirable_weight, undesirable_weight),
            apply_loss_mask,
        )
        self.row_logps = RowLogps()
        self.signs = PreferenceChecks(ln2_is_chance=False)
        self._evaluation_baseline = 0.0

    def prepare(self, batch: Batch) -> Batch:
        """Adds ``labels``, ``counted`` (B,) and the reference's log-probs of the rows,
        ``reference`` (B,)."""
        mask = batch["loss_mask"].bool()
        shown = mask if self.apply_loss_mask else batch["attention_mask"].bool()
        rows = marked(batch["input_ids"], batch["attention_mask"], shown)
        rows |= {"label": batch["label"].bool(), "counted": mask.any(1)}
        rows["reference"] = self.reference.rows(rows, self.row_logps)
        return rows | {key: value for key, value in batch.items() if key.startswith("kl_")}

    def prepare_window(self, window: list[Batch]) -> list[Batch]:
        """z of the window, before anything of it is learned: (B,) in every batch."""
        baseline, rows = self._baseline(window)
        if rows == 0 and any(bool(batch["counted"].any()) for batch in window):
            logger.warning_once(
                "a window of one row has no mismatched answer: KTO's baseline z is 0 there; use "
                "--batch_size 2"
            )
        return [
            batch | {"baseline": torch.full_like(batch["reference"], baseline)} for batch in window
        ]

    def before_evaluation(self, eval_dataloader: Any) -> None:
        self._evaluation_baseline, _ = self._baseline(eval_dataloader)

    def _baseline(self, batches: Any) -> tuple[float, int]:
        """z over ``batches`` of all ranks, and the mismatched rows it is a mean of."""
        total = count = 0.0
        for batch in batches:
            ids, real, mask = (
                batch[f"kl_{name}"] for name in ("input_ids", "attention_mask", "loss_mask")
            )
            rows, counted = marked(ids, real, mask), mask.bool().any(1)
            policy = self.engine.collect(rows, self.row_logps)["rows"]
            gained = policy - self.reference.rows(rows, self.row_logps).to(policy.device)
            total += float(masked_sum(gained, counted.to(gained.device)))
            count += int(counted.sum())
        total, count = self.engine.sum_of_shares([total, count])
        return kto_baseline(total, count), int(count)

    def num_terms(self, batch: Batch) -> Tensor:
        return batch["counted"].sum()

    def loss(self, outputs: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        tokens, mask = scatter_token_logprobs(outputs["logits"], batch["labels"]), supervised(batch)
        gained, counted = self.row_logps(tokens, mask) - batch["reference"], batch["counted"]
        baseline = batch.get(
            "baseline", torch.full_like(gained.detach(), self._evaluation_baseline)
        )
        losses = kto_loss(gained, batch["label"], baseline, self.beta, *self.weights)
        rewards, good = self.beta * gained.detach(), batch["label"] & counted
        bad = ~batch["label"] & counted
        metrics = {
            "chosen_rewards": rewards[good],
            "rejected_rewards": rewards[bad],
            "kl": baseline[counted],
            "accuracy": ((gained.detach() > baseline) == batch["label"]).float()[counted],
            **moments(rewards[counted], mask.sum(1)[counted]),
        }
        return masked_sum(losses, counted), metrics

    def derived(self, metrics: dict[str, float]) -> dict[str, float]:
        if {"chosen_rewards", "rejected_rewards"} <= set(metrics):
            metrics = metrics | {"margin": metrics["chosen_rewards"] - metrics["rejected_rewards"]}
        return metrics

    def observe(self, step: Step) -> list[str]:
        self.signs.add(step.metrics, step.loss, step.num_terms, self.engine.mesh.is_loss_rank)
        return self.signs.look()

    def evaluation_metrics(self, step: Step) -> dict[str, float]:
        return {"loss": step.loss, **interval_of(step, "accuracy")}
