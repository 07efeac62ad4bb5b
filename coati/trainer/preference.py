"""What the preference trainers share: pairs as interleaved rows (2i chosen, 2i + 1 rejected) of one
forward, their log-probs and metrics."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from coati.dataset.load.collator import supervise_all
from coati.models.head import IGNORE_INDEX, scatter_token_logprobs
from coati.models.logprobs import right_pad_order
from coati.models.loss import length_desensitized, masked_sum
from coati.parallel.engine import Engine
from coati.parallel.objective import Batch, Metrics, Objective, Step
from coati.trainer.base import SLTrainer
from coati.trainer.monitor.preference_diagnostics import PreferenceChecks, moments
from coati.utils.meter import MaskedSamples
from coati.utils.statistics import wilson_interval


def interleave(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(B, ...) and (B, ...) -> (2B, ...): row 2i is chosen, row 2i + 1 rejected. The shorter is
    right-padded with 0."""
    if chosen.dim() == 2 and chosen.shape[1] != rejected.shape[1]:
        width = max(chosen.shape[1], rejected.shape[1])
        chosen, rejected = (F.pad(side, (0, width - side.shape[1])) for side in (chosen, rejected))
    return torch.stack([chosen, rejected], dim=1).flatten(0, 1)


def deinterleave(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(2B, ...) -> chosen (B, ...), rejected (B, ...): the inverse of :func:`interleave`."""
    return rows[0::2], rows[1::2]


def supervised(batch: Batch) -> Tensor:
    """(B, S - 1) bool: the tokens whose log-probs count, as the head returns them."""
    return batch["labels"][:, 1:] != IGNORE_INDEX


def with_labels(ids: Tensor, attention_mask: Tensor, loss_mask: Tensor) -> Batch:
    """A batch of right-padded rows (B, S), whatever side their padding was on, with ``labels`` of
    the tokens in ``loss_mask``, else IGNORE_INDEX."""
    order = right_pad_order(attention_mask)
    ids, attention_mask, loss_mask = (
        x.gather(1, order) for x in (ids, attention_mask, loss_mask.bool())
    )
    labels = ids.masked_fill(~(loss_mask & attention_mask.bool()), IGNORE_INDEX)
    return {"input_ids": ids, "attention_mask": attention_mask, "labels": labels}


class PreferenceObjective(Objective):
    """Objectives on pairs. Batches hold ``{chosen,reject}_{input_ids,attention_mask,loss_mask}``
    (B, S).

    A pair with an empty loss mask on either side is ignored. With ``weight`` (B,) the loss is the
    mean over pairs that count as much each. ``apply_loss_mask`` False supervises every token of the
    attention mask.
    """

    rows_together = 2

    def __init__(self, apply_loss_mask: bool = True) -> None:
        self.apply_loss_mask = apply_loss_mask

    def prepare(self, batch: Batch) -> Batch:
        """Pairs (B, S) to interleaved rows (2B, S) with ``labels``; ``counted`` (2B,) bool is False
        for rows of ignored pairs."""
        if not self.apply_loss_mask:
            batch = supervise_all(batch)
        names = ("input_ids", "attention_mask", "loss_mask")
        ids, real, mask = (
            interleave(batch[f"chosen_{name}"], batch[f"reject_{name}"]) for name in names
        )
        rows = with_labels(ids, real, mask)
        whole = mask.bool().any(1).view(-1, 2).all(1)
        rows["counted"] = whole.repeat_interleave(2)
        for name in ("margin", "weight"):
            if name in batch:
                rows[name] = batch[name].repeat_interleave(2)
        if "chosen_reference" in batch:
            rows["reference"] = interleave(batch["chosen_reference"], batch["reject_reference"])
        return rows

    def num_terms(self, batch: Batch) -> Tensor:
        """Pairs that count, or the sum of their weights."""
        if "weight" in batch:
            return masked_sum(batch["weight"], batch["counted"]) / 2
        return batch["counted"].sum() // 2

    def total(self, losses: Tensor, batch: Batch) -> Tensor:
        """The sum of ``losses`` (B,) over the pairs that count, each times its weight."""
        if "weight" in batch:
            losses = losses * batch["weight"][0::2]
        return masked_sum(losses, batch["counted"][0::2])


class PreferenceTrainer(SLTrainer):
    """:class:`SLTrainer` with the diagnostics of preference runs and confidence intervals of
    evaluated accuracies.

    ``accuracy``: the metric that is 1 for a pair ranked correctly. ``ln2_is_chance``: the loss is
    ln 2 while chosen and rejected are not distinguished.
    """

    unit_name = "pairs"
    accuracy = "accuracy"
    ln2_is_chance = True

    def __init__(
        self, engine: Engine, objective: Objective, max_epochs: int = 1, **keywords: Any
    ) -> None:
        super().__init__(engine, objective, max_epochs, **keywords)
        self.checks = PreferenceChecks(self.ln2_is_chance, self.accuracy)

    def diagnose(self, step: Step) -> list[str]:
        self.checks.add(step.metrics, step.loss, step.num_terms, self.engine.mesh.is_loss_rank)
        return self.checks.check()

    def evaluation_metrics(self, step: Step) -> dict[str, float]:
        return {"loss": step.loss, **confidence_interval(step, self.accuracy)}


def confidence_interval(step: Step, name: str) -> dict[str, float]:
    """The 95% Wilson interval of the 0/1 metric ``name`` of an evaluation, and its sample count; {}
    without samples."""
    samples = step.metrics.get(name)
    if not samples:
        return {}
    values = torch.cat(samples)
    low, high = wilson_interval(float(values.sum()), len(values))
    return {f"{name}_low": low, f"{name}_high": high, "count": float(len(values))}


def pair_accuracy(better: Tensor, worse: Tensor) -> Tensor:
    """(B,) 1 where ``better`` is larger, 0 where it is smaller, 0.5 for a tie (every pair at the
    start of DPO)."""
    return (torch.sign(better - worse).float() + 1) / 2


class RowLogps:
    """Sums of token log-probs per row, computed alike for policy and reference. ``ld_alpha``:
    weight of the tokens of the longer response beyond the length of the shorter one (LD-DPO,
    arXiv 2409.06411)."""

    def __init__(self, ld_alpha: float | None = None) -> None:
        self.ld_alpha = ld_alpha

    def __call__(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(R, S) log-probs and their mask -> (R,)."""
        if self.ld_alpha is not None:
            return length_desensitized(tokens, mask, self.ld_alpha)
        return masked_sum(tokens, mask, 1)

    def read(self, logps: Tensor, batch: Batch) -> Tensor:
        """(R,) from the log-probs (n,) of a forward of R rows, for ``forward_only``."""
        return self(scatter_token_logprobs(logps, batch["labels"]), supervised(batch))


def pair_metrics(rewards: Tensor, tokens: Tensor, mask: Tensor, counted: Tensor) -> Metrics:
    """The metrics that every trainer on pairs logs.

    ``rewards`` (2B,) of interleaved rows; ``tokens``, ``mask`` (2B, S) their log-probs; ``counted``
    (2B,) bool.
    """
    pairs = counted[0::2]
    chosen, rejected = deinterleave(rewards.detach())
    lp_chosen, lp_rejected = deinterleave(masked_sum(tokens, mask, 1).detach())
    values = {
        "chosen_rewards": chosen,
        "rejected_rewards": rejected,
        "margin": chosen - rejected,
        "accuracy": pair_accuracy(chosen, rejected),
        "lp_chosen": lp_chosen,
        "lp_rejected": lp_rejected,
    }
    metrics: Metrics = {name: MaskedSamples(value, pairs) for name, value in values.items()}
    return metrics | moments(rewards, mask.sum(1), counted)
