"""Online DPO (arXiv 2402.04792): pairs of the policy's own responses, told apart by a judge, a
reward model or reward functions, and a DPO step on them, episode after episode."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from coati.experience_buffer.pair_buffer import PairBuffer
from coati.experience_maker.experience import Experience
from coati.experience_maker.model_inputs import policy_batch, sum_over, to_actions
from coati.experience_maker.pairs import PairMaker
from coati.experience_maker.rollout_batch import ExperienceSettings
from coati.experience_maker.rollouts.rollout_engine import RolloutEngine
from coati.models.head_outputs import HeadOutputs
from coati.models.loss import masked_sum
from coati.models.pairwise_loss import PairLoss, PairwiseObjective
from coati.models.rollout_correction import RolloutCorrection
from coati.parallel.engine import Engine
from coati.parallel.inference_model import InferenceModel
from coati.parallel.objective import Batch, Metrics
from coati.trainer.dpo import losses_and_rewards
from coati.trainer.episodes import Episodes
from coati.trainer.online import OLTrainer
from coati.trainer.policy_objective import PolicyObjective, PolicySettings
from coati.trainer.preference import RowLogps, pair_metrics
from coati.utils.meter import MaskedSamples


@dataclass(frozen=True)
class PairLossSettings:
    """The losses of a run, as :class:`~coati.trainer.dpo.DPOTrainer` takes them. ``beta``: the
    values that the run goes through, each for an equal part of its episodes; None: each loss's own.
    ``loss``: a user's function in place of ``loss_type``."""

    loss_type: str | Sequence[str] = "dpo_loss"
    loss_weights: Sequence[float] | None = None
    beta: Sequence[float] | None = None
    gamma: float | None = None
    label_smoothing: float = 0.0
    length_normalization: bool = False
    sft_coef: float = 0.0
    ld_alpha: float | None = None
    loss: PairLoss | None = None

    def objectives(self) -> list[PairwiseObjective]:
        """One for each beta, in their order."""
        return [self._objective(beta) for beta in (self.beta or [None])]

    def _objective(self, beta: float | None) -> PairwiseObjective:
        shared: dict[str, Any] = {
            "beta": beta,
            "length_normalization": self.length_normalization,
            "sft_coef": self.sft_coef,
        }
        if self.loss is not None:
            return PairwiseObjective.from_function(self.loss, **shared)
        own: dict[str, Any] = {"gamma": self.gamma, "label_smoothing": self.label_smoothing}
        return PairwiseObjective.of(self.loss_type, self.loss_weights, **shared, **own)


def part_of(episode: int, episodes: int, parts: int) -> int:
    """Which of ``parts`` equal parts of a run of ``episodes`` an episode is in; beyond its end the
    last."""
    return min(episode * parts // max(episodes, 1), parts - 1)


class OnlineDPOObjective(PolicyObjective):
    """A pairwise loss, or a weighted sum of them, of an experience whose rows are pairs; mean over
    the pairs of the global batch that are no ties. Log-probs are of temperature 1."""

    rows_together = 2

    def __init__(self, settings: PairLossSettings, reduce_sum: Callable[[Tensor], Tensor]) -> None:
        # Pairs of older weights are as good as any: the loss is of log-ratios to the reference, and
        # nothing in it stands for what sampled.
        super().__init__(PolicySettings(correction=RolloutCorrection("none")), reduce_sum)
        self.objectives = settings.objectives()
        self.pairwise = self.objectives[0]
        self.row_logps = RowLogps(settings.ld_alpha)

    @property
    def beta(self) -> float:
        """That of the first loss, now."""
        return self.pairwise.primary.settings.beta

    def _batch(self, experience: Experience) -> Batch:
        """As of :class:`PolicyObjective`; ``counted`` (2B,) bool is False for both rows of a
        tie."""
        mask = experience.action_mask
        batch = policy_batch(experience)
        batch |= {"action_mask": mask, "old": experience.action_log_probs}
        if experience.reference_log_probs is not None:
            batch["reference"] = experience.reference_log_probs
        if experience.sampled_log_probs is not None:
            batch["sampled"] = experience.sampled_log_probs
        batch["counted"] = mask.bool().any(1).view(-1, 2).all(1).repeat_interleave(2)
        return batch

    def num_terms(self, batch: Batch) -> Tensor:
        """Pairs that count."""
        return batch["counted"].sum() // 2

    def loss(self, logps: Tensor | HeadOutputs, batch: Batch) -> tuple[Tensor, Metrics]:
        """Sum over pairs; rewards are beta (log pi - log reference)."""
        assert isinstance(logps, Tensor)  # as no head_request asks for more
        mask = batch["action_mask"].bool()
        tokens = to_actions(logps, mask)
        scores = self.row_logps(tokens, mask)
        reference = torch.zeros_like(scores)
        if "reference" in batch:
            reference = self.row_logps(batch["reference"], mask)
        losses, rewards = losses_and_rewards(self.pairwise, scores, reference, tokens, mask)
        found = pair_metrics(rewards, tokens, mask, batch["counted"])
        metrics: Metrics = {name: each for name, each in found.items() if not name.startswith("_")}
        sampled = batch["sampled"] if "sampled" in batch else batch["old"]
        if self.first_pass:
            metrics["sampled_entropy"] = MaskedSamples(-sampled.float(), mask)
            if "sampled" not in batch:  # otherwise measured where the responses were collected
                metrics["rollout_gap"] = MaskedSamples((tokens.detach() - sampled).abs(), mask)
        return masked_sum(losses, batch["counted"][0::2]), metrics


class OnlineDPOTrainer(OLTrainer):
    """:class:`~coati.trainer.online.OLTrainer` with an :class:`OnlineDPOObjective`, whose beta
    follows the episode."""

    method = "online_dpo"

    def _begin_update(self, version: int) -> None:
        objective = cast(OnlineDPOObjective, self.policy_objective)
        parts = objective.objectives
        now = part_of(self.episode, self.episodes.num_episodes, len(parts))
        objective.pairwise = parts[now]
        objective.version = version

    def _metrics(self) -> dict[str, float]:
        metrics = super()._metrics()
        metrics.pop("kl_coef", None)  # of a penalty beside the loss, which there is not
        return metrics | {"beta": cast(OnlineDPOObjective, self.policy_objective).beta}


def assemble_online_dpo(
    experience: ExperienceSettings,
    loss: PairLossSettings,
    *,
    actor: Engine,
    reference: InferenceModel | None,
    rollout: RolloutEngine,
    scorer: Callable[..., Any],
    tokenizer: Any,
    micro_batch_size: int = 4,
    episodes: Episodes | None = None,
    ptx_coef: float = 0.0,
) -> dict[str, Any]:
    """The parts of :class:`OnlineDPOTrainer`, by its arguments. ``micro_batch_size`` counts pairs;
    ``reference`` None: its log-probs are 0."""
    maker = PairMaker(actor, rollout, scorer, tokenizer, experience, reference=reference)
    return {
        "actor": actor,
        "maker": maker,
        "buffer": PairBuffer(micro_batch_size),
        "episodes": episodes or Episodes(),
        "objective": OnlineDPOObjective(loss, sum_over(actor)),
        "ptx_coef": ptx_coef,
    }
