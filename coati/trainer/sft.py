"""Supervised fine-tuning: the mean negative log-probability of the supervised tokens."""

import math
from typing import Any

import torch
from torch import Tensor

from coati.parallel.engine import Batch, Engine, Step
from coati.trainer.base import RunSchedule, SLTrainer


class SFTTrainer(SLTrainer):
    """L = sum over supervised tokens of -log p / their number, over the whole window of all ranks.

    Takes what ``booster.boost`` returned, or an :class:`~coati.parallel.engine.Engine`::

        SFTTrainer(model, booster, optim, lr_scheduler, max_epochs=1,
        accumulation_steps=1).fit(train_dataloader)

    Args:
        apply_loss_mask: False supervises every token the attention mask shows; padding never.
        save_interval, save_dir: shorthands for the fields of ``plan``.
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
        plan: RunSchedule | None = None,
        **keywords: Any,
    ) -> None:
        engine = engine or Engine(booster, model, optim, lr_scheduler)
        plan = plan or RunSchedule(save_dir=save_dir, save_interval=save_interval or 0)
        super().__init__(
            engine, max_epochs, accumulation_steps=accumulation_steps, plan=plan, **keywords
        )
        self.state.epoch = max(self.state.epoch, start_epoch)
        self.apply_loss_mask = apply_loss_mask

    def prepare(self, batch: Batch) -> Batch:
        if self.apply_loss_mask:
            return batch
        hidden = batch["attention_mask"] == 0
        if (
            "position_ids" in batch
        ):  # of a pack: nothing before a row's first token may be asked to predict it
            hidden |= batch["position_ids"] == 0
        return batch | {"labels": batch["input_ids"].masked_fill(hidden, -100)}

    def loss(self, outputs: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return -outputs["logits"].sum(), {}

    def evaluation_metrics(self, step: Step) -> dict[str, float]:
        return {"loss": step.loss, "perplexity": math.exp(min(step.loss, 700.0))}
