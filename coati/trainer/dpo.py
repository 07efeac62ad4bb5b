"""Direct preference optimization and its family: a pairwise loss of policy and reference
log-probs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coati.models.head import scatter_token_logprobs
from coati.models.head_outputs import HeadOutputs, HeadRequest
from coati.models.loss import masked_mean
from coati.models.pairwise_loss import Pair, PairLoss, PairwiseObjective
from coati.parallel.engine import Engine
from coati.parallel.inference_model import InferenceModel
from coati.parallel.objective import Batch, Metrics, Step
from coati.trainer.preference import (
    PreferenceObjective,
    PreferenceTrainer,
    RowLogps,
    deinterleave,
    interleave,
    pair_metrics,
    supervised,
)
from coati.utils.meter import MaskedSamples

# Relative tolerance of the first loss against that of a policy that is its reference.
TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2, "fp16": 1e-2}


class DPOObjective(PreferenceObjective):
    """A pairwise loss, or a weighted sum of them.

    Args:
        pairwise: the loss.
        reference: the reference model; None where batches hold ``chosen_reference`` and
            ``reject_reference`` (B,), sums over tokens, or where there is no reference.
        ld_alpha: of the longer response of a pair, tokens beyond the shorter's length count this
            much (LD-DPO).
        apply_loss_mask: False supervises every token the attention mask shows.
        wpo: each pair's loss is multiplied by how probable the policy finds its two responses (WPO,
            :func:`policy_weights`).
    """

    def __init__(
        self,
        pairwise: PairwiseObjective,
        reference: InferenceModel | None = None,
        ld_alpha: float | None = None,
        apply_loss_mask: bool = True,
        wpo: bool = False,
    ) -> None:
        super().__init__(apply_loss_mask)
        self.pairwise = pairwise
        self.reference = reference
        self.row_logps = RowLogps(ld_alpha)
        self.wpo = wpo

    def head_request(self, batch: Batch) -> HeadRequest | None:
        return HeadRequest(entropy=True, entropy_order=2) if self.wpo else None

    def engines(self) -> list[Any]:
        return [] if self.reference is None else [self.reference.engine]

    def prepare(self, batch: Batch) -> Batch:
        """Adds ``reference`` (2B,), the reference's log-probs of the rows."""
        rows = super().prepare(batch)
        if self.reference is not None and "reference" not in rows:
            rows["reference"] = self.reference.forward_only(
                rows, self.row_logps.read, rows_together=self.rows_together
            )
        return rows

    def loss(self, logps: Tensor | HeadOutputs, batch: Batch) -> tuple[Tensor, Metrics]:
        """Sum over pairs; rewards are beta (log pi - log reference)."""
        weights = None
        if isinstance(logps, HeadOutputs):
            assert logps.entropy is not None
            weights = policy_weights(logps.logps, logps.entropy, batch)
            logps = logps.logps
        tokens = scatter_token_logprobs(logps, batch["labels"])  # (2B, S - 1)
        mask = supervised(batch)
        scores = self.row_logps(tokens, mask)
        reference = batch["reference"] if "reference" in batch else torch.zeros_like(scores)
        losses, rewards = losses_and_rewards(self.pairwise, scores, reference, tokens, mask)
        metrics = pair_metrics(rewards, tokens, mask, batch["counted"])
        if weights is not None:
            losses = losses * weights
            metrics["wpo_weight"] = MaskedSamples(weights, batch["counted"][0::2])
        return self.total(losses, batch), metrics


def policy_weights(logps: Tensor, collision_entropy: Tensor, batch: Batch) -> Tensor:
    """WPO's weights (B,) of pairs, detached: the product over both responses of
    exp(mean_t(log pi(y_t) - log sum_v pi(v)^2)), which brings pairs of other models toward those
    that the policy itself would write (arXiv 2406.11827, with sampled alignment: a token's
    probability relative to that of a token that the policy samples). ``logps``,
    ``collision_entropy`` (n,): log pi(y_t) and -log sum_v pi(v)^2 at the n labels of the batch."""
    aligned = logps.detach() + collision_entropy.detach()
    means = masked_mean(scatter_token_logprobs(aligned, batch["labels"]), supervised(batch), 1)
    return torch.stack(deinterleave(means)).sum(0).exp()


def losses_and_rewards(
    pairwise: PairwiseObjective, scores: Tensor, reference: Tensor, tokens: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Losses (B,) of interleaved rows, and their rewards (2B,): beta (log pi - log reference) of
    the first loss. ``scores``, ``reference`` (2B,): log-probs of rows under policy and reference;
    ``tokens``, ``mask`` (2B, S): the policy's of each token."""
    pair = Pair(*deinterleave(scores), *deinterleave(reference), *deinterleave(mask.sum(1)))
    losses = pairwise(pair, -masked_mean(tokens, mask, 1)[0::2])
    term = pairwise.primary
    seen = term.view(pair)
    return losses, term.settings.beta * interleave(seen.c, seen.r)


class DPOTrainer(PreferenceTrainer):
    """Takes what ``booster.boost`` returned, or an :class:`~coati.parallel.engine.Engine`.

    Args:
        ref_model: a plain frozen model; or ``reference``, an
            :class:`~coati.parallel.inference_model.InferenceModel`.
        loss_type: a name of :data:`~coati.models.loss_registry.LOSS_TYPES`, or several with their
            ``loss_weights`` (default 1 each), among them perhaps "sft"; each loss's own beta and
            gamma hold where they are None.
        length_normalization: every loss reads means over a row's supervised tokens.
        sft_coef: a of + a x the mean negative log-prob of the chosen response's tokens.
        ld_alpha, apply_loss_mask, wpo: of :class:`DPOObjective`.
        loss: a function of a :class:`~coati.models.pairwise_loss.Pair` that returns losses (B,), in
            place of ``loss_type`` and its options; ``beta`` is then that of the logged rewards
            alone.
        starts_at_reference: the policy is the reference at step 0, so the first loss is known and
            checked.
        keywords: of :class:`~coati.trainer.base.SLTrainer`.
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
        loss_type: str | Sequence[str] = "dpo_loss",
        loss_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        sft_coef: float = 0.0,
        ld_alpha: float | None = None,
        apply_loss_mask: bool = True,
        starts_at_reference: bool = False,
        wpo: bool = False,
        loss: PairLoss | None = None,
        **keywords: Any,
    ) -> None:
        shared: dict[str, Any] = {
            "length_normalization": length_normalization,
            "sft_coef": sft_coef,
            "beta": beta,
        }
        if loss is not None:
            pairwise = PairwiseObjective.from_function(loss, **shared)
        else:
            own: dict[str, Any] = {"gamma": gamma, "label_smoothing": label_smoothing}
            pairwise = PairwiseObjective.of(loss_type, loss_weights, **shared, **own)
        if ref_model is not None:
            reference = InferenceModel.plain(ref_model)
        self.ln2_is_chance = not wpo
        super().__init__(
            engine or Engine(booster, actor, actor_optim, actor_lr_scheduler),
            DPOObjective(pairwise, reference, ld_alpha, apply_loss_mask, wpo),
            max_epochs,
            **keywords,
        )
        self.starts_at_reference = starts_at_reference and not wpo

    def diagnose(self, step: Step) -> list[str]:
        return [*self._first_loss(step), *super().diagnose(step)]

    def _first_loss(self, step: Step) -> list[str]:
        """At the first step, how its loss differs from that of a policy that is its reference, and
        the likely cause."""
        wanted = self.objective.pairwise.at_reference()
        if self.state.step != 1 or not self.starts_at_reference or wanted is None:
            return []
        tolerance = TOLERANCE[self.engine.options.precision or "fp32"] * wanted
        if not step.num_terms or abs(step.loss - wanted) <= tolerance:
            return []
        if self.objective.reference is None:
            cause = (
                "the stored reference log-probs are of another model, template or precision; "
                "remove their file"
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
