"""Distillation from a teacher, on the rows' responses and on the student's own (generalized
knowledge distillation, arXiv 2306.13649)."""

import math
from typing import Any

import torch
from torch import Tensor

from coati.dataset.load.collator import supervise_all
from coati.models.head_outputs import HeadOutputs, HeadRequest
from coati.models.logprobs import IGNORE_INDEX
from coati.parallel.engine import Batch, Engine, Step
from coati.parallel.inference_model import InferenceModel
from coati.parallel.objective import Metrics, Objective
from coati.trainer.base import SLTrainer
from coati.trainer.on_policy_rows import OnPolicyRows, OnPolicySettings
from coati.trainer.sft import token_weights
from coati.trainer.teachers import ModelTeacher, Teacher
from coati.utils.meter import MaskedSamples


class GKDObjective(Objective):
    """L = sum over supervised tokens of D_beta(teacher, student), at temperature 1, and of
    ``sft_coef`` x -log q where the token is a row's own, not of a response of the student. Where a
    batch has ``loss_weights`` (B, S), each token's part is multiplied by its weight.

    Args:
        beta: 0: KL(teacher || student); 1: KL(student || teacher); between them the generalized
            Jensen-Shannon divergence (:mod:`coati.models.distillation`).
        apply_loss_mask: False supervises every token the attention mask shows; padding never.
    """

    def __init__(
        self,
        teacher: Teacher,
        beta: float = 0.5,
        sft_coef: float = 0.0,
        apply_loss_mask: bool = True,
    ) -> None:
        self.teacher = teacher
        self.beta = beta
        self.sft_coef = sft_coef
        self.apply_loss_mask = apply_loss_mask

    def engines(self) -> list[Any]:
        return self.teacher.engines()

    def prepare(self, batch: Batch) -> Batch:
        """Adds what the teacher says of it."""
        if not self.apply_loss_mask:
            batch = supervise_all(batch)
        return batch | self.teacher.look_at(batch)

    def token_keys(self) -> tuple[str, ...]:
        return self.teacher.token_keys

    def head_request(self, batch: Batch) -> HeadRequest:
        return self.teacher.request(batch, self.beta)

    def num_terms(self, batch: Batch) -> Tensor:
        weights = token_weights(batch)
        return super().num_terms(batch) if weights is None else weights.double().sum()

    def loss(self, outputs: Any, batch: Batch) -> tuple[Tensor, Metrics]:
        """Sum over supervised tokens."""
        assert isinstance(outputs, HeadOutputs) and outputs.divergence is not None
        sampled = self._sampled(batch)
        losses = outputs.divergence
        if self.sft_coef:
            losses = losses - self.sft_coef * outputs.logps.masked_fill(sampled, 0.0)
        weights = token_weights(batch)
        teacher_nll = -self.teacher.label_logps(outputs, batch)
        metrics: Metrics = {
            "divergence": outputs.divergence.detach(),
            "nll": MaskedSamples(-outputs.logps.detach(), ~sampled),
            "teacher_nll": MaskedSamples(teacher_nll, ~sampled),
        }
        if "on_policy" in batch:
            on_policy = batch["on_policy"]
            lengths = (batch["labels"][:, 1:] != IGNORE_INDEX).sum(1).float()
            metrics["on_policy"] = on_policy.float()
            metrics["on_policy_divergence"] = MaskedSamples(outputs.divergence.detach(), sampled)
            metrics["response_length"] = MaskedSamples(lengths, on_policy)
        return (losses if weights is None else losses * weights).sum(), metrics

    def _sampled(self, batch: Batch) -> Tensor:
        """(n,) bool: the supervised tokens that the student wrote."""
        supervised = batch["labels"][:, 1:] != IGNORE_INDEX
        if "on_policy" not in batch:
            return torch.zeros(
                int(supervised.sum()), dtype=torch.bool, device=batch["labels"].device
            )
        return batch["on_policy"][:, None].expand_as(supervised)[supervised]


class GKDTrainer(SLTrainer):
    """Takes what ``booster.boost`` returned, or an :class:`~coati.parallel.engine.Engine`.

    Args:
        teacher_model: a plain frozen model of the student's vocabulary; or ``teacher``, a
            :class:`~coati.trainer.teachers.Teacher`.
        on_policy: which rows the student answers itself, and how; None: none.

    The others are those of :class:`GKDObjective` and of :class:`~coati.trainer.base.SLTrainer`.

    Raises:
        ValueError: without a teacher.
    """

    name = "gkd"

    def __init__(
        self,
        model: torch.nn.Module | None = None,
        teacher_model: torch.nn.Module | None = None,
        booster: Any = None,
        optim: Any = None,
        lr_scheduler: Any = None,
        max_epochs: int = 1,
        beta: float = 0.5,
        sft_coef: float = 0.0,
        *,
        engine: Engine | None = None,
        teacher: Teacher | None = None,
        on_policy: OnPolicySettings | None = None,
        apply_loss_mask: bool = True,
        **keywords: Any,
    ) -> None:
        if teacher is None and teacher_model is None:
            raise ValueError("distillation needs a teacher: pass teacher_model, or teacher")
        engine = engine or Engine(booster, model, optim, lr_scheduler)
        teacher = teacher or ModelTeacher(InferenceModel.plain(teacher_model))
        teacher.vocabulary = engine.module.config.get_text_config().vocab_size
        objective = GKDObjective(teacher, beta, sft_coef, apply_loss_mask)
        super().__init__(engine, objective, max_epochs, **keywords)
        self.on_policy = None if on_policy is None else OnPolicyRows(engine, on_policy)

    def training_batches(self, micro_batches: list[Batch]) -> list[Batch]:
        if self.on_policy is None:
            return micro_batches
        with self.throughput.clock.timed("sampling"):
            start = self.state.sample_start_index
            if getattr(self._loader, "counts_batches", False):
                start *= len(micro_batches[0]["input_ids"]) * self.engine.mesh.dp_size
            return self.on_policy(micro_batches, self.state.epoch, start)

    def evaluation_metrics(self, step: Step) -> dict[str, float]:
        """``loss``, of the rows' own responses; ``perplexity``, of the student's nll."""
        nll = step.metrics.get("nll", [])
        if not nll:
            return {"loss": step.loss}
        mean = float(torch.cat(nll).double().mean())
        return {"loss": step.loss, "perplexity": math.exp(min(mean, 700.0))}
