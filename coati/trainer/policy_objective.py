"""The objectives of PPO and GRPO: surrogate policy loss, clipped value loss, and the supervised
loss on pretraining rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from coati.experience_maker.experience import Experience
from coati.experience_maker.model_inputs import critic_batch, policy_batch, to_actions, values_at
from coati.models.head_outputs import HeadOutputs, HeadRequest
from coati.models.loss import masked_sum
from coati.models.policy_loss import (
    LossAggregation,
    PolicyTokenLoss,
    PolicyTokens,
    kl_per_token,
    mean_ratio_exceeds,
    own_policy_terms,
    ratio_sums,
    value_statistics,
    value_terms,
)
from coati.models.rollout_correction import RolloutCorrection
from coati.models.surrogate_loss import (
    SurrogateSettings,
    surrogate_statistics,
    surrogate_terms,
)
from coati.parallel.objective import Batch, Metrics, Objective
from coati.trainer.sft import SFTObjective
from coati.utils.meter import MaskedSamples


@dataclass(frozen=True)
class PolicySettings:
    """The policy's loss. ``kl_coef``: of the KL term in the loss; 0 where KL is part of the
    reward. ``entropy_coef``: of the entropy of the next token's distribution, a bonus. ``loss``: a
    user's function of :class:`~coati.models.policy_loss.PolicyTokens` in place of the surrogate
    loss, (B, A) losses out; KL term and bonus are added to it. ``correction``: the weights of the
    surrogate's terms, not of the KL term and the bonus, for responses of older weights."""

    surrogate: SurrogateSettings = SurrogateSettings()
    skip_threshold: float = 20.0
    loss_agg: LossAggregation = LossAggregation("token-mean")
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    loss: PolicyTokenLoss | None = None
    correction: RolloutCorrection = RolloutCorrection()


class PolicyObjective(Objective):
    """Policy gradient over the actions of an experience. ``temperature``: at which it was
    sampled. ``version``: of the weights that the update began with."""

    def __init__(self, settings: PolicySettings, reduce_sum: Callable[[Tensor], Tensor]) -> None:
        self.settings = settings
        self.reduce_sum = reduce_sum
        self.kl_coef = settings.kl_coef  # a KL target moves it
        self.first_pass = False  # whether the policy is still the one that the update began with
        self.version = 0

    def batches(self, micro_batches: Sequence[Experience]) -> list[Batch]:
        """For each micro-batch what the model gets, and per action (B, A) what the loss needs."""
        return [self._batch(experience) for experience in micro_batches]

    def _batch(self, experience: Experience) -> Batch:
        batch = policy_batch(experience)
        batch |= {
            "action_mask": experience.action_mask,
            "old": experience.action_log_probs,
            "advantages": experience.advantages,
        }
        if experience.reference_log_probs is not None:
            batch["reference"] = experience.reference_log_probs
        if experience.version is not None:
            batch |= self._of_others(experience, experience.version != self.version)
        return batch

    def _of_others(self, experience: Experience, stale: Tensor) -> Batch:
        """What responses have beside the rest that another engine, or older weights, sampled."""
        correction = self.settings.correction
        sampled = experience.sampled_log_probs
        if sampled is None:
            if correction.off:
                return {}
            raise ValueError(
                "--rollout_is: the rollout engine gave no log-probs of the older weights that "
                "sampled, so nothing can be corrected by them; take --rollouts_ahead 0, or "
                "--rollout_is none"
            )
        policy = experience.action_log_probs
        weights = correction.weights(policy, sampled, experience.action_mask, stale)
        return {"sampled": sampled, "weights": weights}

    def num_terms(self, batch: Batch) -> Tensor:
        return self.settings.loss_agg.num_terms(batch["action_mask"])

    def head_request(self, batch: Batch) -> HeadRequest | None:
        return HeadRequest(entropy=True) if self.settings.entropy_coef else None

    def loss(self, logps: Tensor | HeadOutputs, batch: Batch) -> tuple[Tensor, Metrics]:
        mask = batch["action_mask"]
        old = batch["old"]
        settings = self.settings
        entropy = None
        if isinstance(logps, HeadOutputs):
            entropy = to_actions(logps.entropy, mask)
            logps = logps.logps
        logps = to_actions(logps, mask)
        # Decided by all ranks together: a step that one rank leaves out would be half a step.
        skip = mean_ratio_exceeds(
            self.reduce_sum(ratio_sums(logps, old, mask)), settings.skip_threshold
        )
        advantages = batch["advantages"]
        function = settings.loss or partial(surrogate_terms, settings=settings.surrogate)
        terms = own_policy_terms(function, logps, old, advantages, mask, skip)
        if "weights" in batch:
            terms = terms * batch["weights"]
        metrics: Metrics = {}
        tokens = PolicyTokens(logps, old, advantages, mask)
        metrics |= surrogate_statistics(tokens, settings.surrogate)
        metrics["skip_ratio"] = skip.float()[None]
        if entropy is not None:
            metrics["policy_entropy"] = MaskedSamples(entropy.detach(), mask.bool())
            terms = terms - settings.entropy_coef * entropy.masked_fill(skip, 0.0)
        if self.kl_coef:
            kl = kl_per_token(logps, batch["reference"], mask, settings.kl_estimator)
            terms = terms + self.kl_coef * kl.masked_fill(skip, 0.0)
        if "sampled" in batch:  # -log mu of what mu sampled: the entropy of what was sampled from
            metrics["sampled_entropy"] = MaskedSamples(-batch["sampled"].float(), mask.bool())
        elif self.first_pass:  # otherwise measured where the responses were collected
            metrics["rollout_gap"] = MaskedSamples((logps.detach() - old).abs(), mask.bool())
        return settings.loss_agg.total(terms, mask), metrics


class ValueObjective(Objective):
    """The clipped squared error of the values, mean over the actions of the global batch."""

    def __init__(self, clip: float = 0.2) -> None:
        self.clip = clip

    def batches(self, micro_batches: Sequence[Experience]) -> list[Batch]:
        """For each micro-batch what the critic gets, and per action (B, A) what the loss needs."""
        return [
            critic_batch(each)
            | {"action_mask": each.action_mask, "old": each.values, "returns": each.returns}
            for each in micro_batches
        ]

    def num_terms(self, batch: Batch) -> Tensor:
        return batch["action_mask"].sum()

    def loss(self, values: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        mask = batch["action_mask"]
        values = to_actions(values_at(values, batch), mask)
        terms = value_terms(values, batch["old"], batch["returns"], mask, self.clip)
        statistics = value_statistics(values, batch["old"], mask, self.clip)
        return masked_sum(terms, mask), {"value_clip_fraction": statistics["value_clip_fraction"]}


class PtxObjective(SFTObjective):
    """The supervised loss of rows that the policy must not forget (PPO-ptx, arXiv 2203.02155, eq.
    2), at temperature 1 whatever it samples at."""
