"""What :class:`~coati.trainer.ppo.PPOTrainer` and :class:`~coati.trainer.grpo.GRPOTrainer` share:
training models that ``booster.boost`` returned, with ColossalChat's keywords.

The training scripts have more settings and call :func:`~coati.trainer.rl_assembly.assemble_rl`
themselves.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from coati.experience_buffer.batch_sizes import optimizer_steps_per_pass
from coati.experience_maker.experience import Experience
from coati.experience_maker.rollouts.rollout_engine import ModelRollout
from coati.experience_maker.scoring import Scorer
from coati.models.generation.end_tokens import stop_sequences
from coati.models.generation.loop import Sampling
from coati.models.policy_loss import LossAggregation
from coati.models.policy_registry import POLICY_LOSSES
from coati.models.rlvr_reward_model import RLVRRewardModel
from coati.models.surrogate_loss import SurrogateSettings
from coati.parallel.engine import Engine
from coati.parallel.inference_model import InferenceModel
from coati.rewards.responses import Responses
from coati.rewards.scorer import Rewards
from coati.trainer.episodes import Episodes
from coati.trainer.global_batches import as_global_batches
from coati.trainer.online import OLTrainer
from coati.trainer.policy_objective import PolicySettings
from coati.trainer.rl_assembly import RLSettings, assemble_rl, linear_annealing
from coati.trainer.schedule import RunSchedule

SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")


class BoostedRLTrainer(OLTrainer):
    """Base of the two trainers.

    Args:
        booster, model, optimizer and schedule (of actor and critic): as ``booster.boost`` took and
            returned them.
        reward_model: a :class:`~coati.models.reward_model.RewardModel`,
            :class:`~coati.rewards.scorer.Rewards`, or
            :class:`~coati.models.rlvr_reward_model.RLVRRewardModel`.
        initial_model: the frozen reference policy, not boosted; None: no KL.
        tokenizer: its ``eos_token_id`` and the actor's end responses unless
            ``stop_token_ids`` is given.
        train_batch_size: rows of a micro-batch.
        buffer_limit: only so many of the newest rows are kept; 0: all.
        inference_batch_size: rows generated at a time; None: all.
        logits_forward_batch_size: rows per forward of policy, reference, critic and reward model;
            None: all.
        ptx_coef: c of (1 - c) x policy loss + c x supervised loss; 0 where there are no supervised
            rows.
        eps_clip: the clip range of the probability ratio, where ``policy_loss`` has no other (GSPO)
            or none.
        entropy_coef: of the entropy bonus.
        rollouts_ahead: episodes whose responses are sampled while another is trained; theirs are of
            weights that are so many episodes older, which importance weights correct for
            (:class:`~coati.models.rollout_correction.RolloutCorrection`).
        generate_kwargs: ``max_new_tokens`` (required), ``stop_token_ids`` (one sequence of
            ids or a list of them), ``do_sample``, ``temperature``, ``top_k``, ``top_p``,
            ``repetition_penalty``.

    Raises:
        TypeError: for an unknown keyword, for a missing ``max_new_tokens``, and for a
            ``reward_model`` of another type.
        ValueError: if the plugin cannot generate.
    """

    _ahead: int = 0

    def _assemble(
        self,
        settings: RLSettings,
        actor: Engine,
        critic: Engine | None,
        reward_model: Any,
        initial_model: nn.Module | None,
        tokenizer: Any,
        sampling: Sampling,
        schedule: RunSchedule,
        accumulation_steps: int,
    ) -> None:
        self._accumulation_steps = accumulation_steps
        self._temperature = linear_annealing(sampling.temperature, sampling.temperature, 0, 1)
        experience = settings.experience
        rollout = ModelRollout(
            actor,
            sampling=sampling,
            stop_sequences=experience.stop_sequences,
            max_new_tokens=experience.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        parts = assemble_rl(
            settings,
            actor=actor,
            critic=critic,
            reference=None if initial_model is None else InferenceModel.plain(initial_model),
            rollout=rollout,
            scorer=scorer_of(reward_model, experience.forward_batch_size),
            tokenizer=tokenizer,
        )
        super().__init__(**parts, schedule=schedule)

    def fit(
        self,
        num_episodes: int,
        num_collect_steps: int,
        num_update_steps: int,
        prompt_dataloader: Any,
        pretrain_dataloader: Any = None,
        log_dir: str | None = None,
        use_wandb: bool = False,
        *,
        report_to: Sequence[str] = (),
        eval_prompt_dataloader: Any = None,
    ) -> None:
        """Train.

        Args:
            num_collect_steps: batches of ``prompt_dataloader`` that are rolled out in an episode.
            num_update_steps: passes over the responses.
            prompt_dataloader: a DataLoader of equal batches, each ``input_ids`` and
                ``attention_mask`` (B, P) padded on the left, with ``gt_answer``, a list of B, where
                a reward function asks for it.
            pretrain_dataloader: of supervised rows, for ``ptx_coef``.
            eval_prompt_dataloader: an :class:`~coati.dataset.load.loader.EvaluationLoader` of other
                prompts.

        Raises:
            ValueError: if the responses of an episode are not a whole number of global batches, and
                for a ``ptx_coef`` without ``pretrain_dataloader``.
        """
        if self.ptx_coef and pretrain_dataloader is None:
            raise ValueError(
                f"ptx_coef is {self.ptx_coef:g}, but there is no pretrain_dataloader; give one, or "
                "set ptx_coef to 0"
            )
        prompts = as_global_batches(prompt_dataloader, num_collect_steps)
        settings = self.maker.settings
        steps = optimizer_steps_per_pass(
            num_collect_steps,
            prompt_dataloader.batch_size,
            self.buffer.sample_batch_size,
            self._accumulation_steps,
            settings.num_generations,
        )
        self.episodes = Episodes(
            num_episodes,
            num_update_steps,
            steps,
            self._temperature,
            settings.seed,
            ahead=self._ahead,
        )
        supervised = None
        if pretrain_dataloader is not None:
            supervised = as_global_batches(pretrain_dataloader, self._accumulation_steps)
        self.run(prompts, eval_prompt_dataloader, supervised, log_dir, use_wandb, report_to)


class _RowFunctions:
    """:class:`~coati.models.rlvr_reward_model.RLVRRewardModel` with the interface of a
    :class:`~coati.experience_maker.scoring.Scorer`."""

    def __init__(self, model: RLVRRewardModel) -> None:
        self.model = model

    def __call__(
        self, experience: Experience, responses: Responses
    ) -> tuple[Tensor, dict[str, Tensor]]:
        start = experience.prompt_width
        lengths = experience.response_lengths()
        rewards = self.model(
            experience.sequences,
            experience.attention_mask,
            response_start=[start] * len(lengths),
            response_end=(start + lengths).tolist(),
            gt_answer=responses.gt_answers,
        )
        rewards = rewards.float().cpu()
        return rewards, {"reward_functions": rewards}


def scorer_of(reward_model: Any, batch_size: int | None) -> Callable:
    """The scorer of ``reward_model``. Raises TypeError if it is not a reward model."""
    if isinstance(reward_model, RLVRRewardModel):
        return _RowFunctions(reward_model)
    if isinstance(reward_model, Rewards):
        return Scorer(functions=reward_model)
    if not isinstance(reward_model, torch.nn.Module):
        raise TypeError(
            f"reward_model is {type(reward_model).__name__}; expected a RewardModel, "
            "coati.rewards.Rewards or an RLVRRewardModel"
        )
    return Scorer(InferenceModel.plain(reward_model), batch_size=batch_size)


def policy_settings(
    name: str,
    clip_low: float,
    clip_high: float | None = None,
    loss_agg: LossAggregation | None = None,
    **settings: Any,
) -> PolicySettings:
    """Of the policy loss ``name``, with its own clip ranges and mean where it has them.
    ``clip_high`` None: ``clip_low``; ``loss_agg`` None: token-mean. ``settings``: further ones.
    Raises ValueError for an unknown name."""
    surrogate = SurrogateSettings(name)
    own = POLICY_LOSSES[name]
    low = own.clip_low or clip_low
    high = own.clip_high or clip_high or clip_low
    agg = loss_agg or LossAggregation()
    agg = replace(agg, mode=own.loss_agg_mode or agg.mode)
    clipped = replace(surrogate, clip_low=low, clip_high=high)
    return PolicySettings(clipped, loss_agg=agg, **settings)


@dataclass(frozen=True)
class Generation:
    """Sampling parameters and stop sequences of responses."""

    stop_sequences: list[list[int]]
    max_new_tokens: int
    sampling: Sampling

    @classmethod
    def of(cls, tokenizer: Any, actor: nn.Module, given: dict[str, Any]) -> "Generation":
        """From keywords. Raises TypeError for unknown ones and if ``max_new_tokens`` is
        missing."""
        known = ("max_new_tokens", "stop_token_ids", *SAMPLING)
        if unknown := sorted(set(given) - set(known)):
            raise TypeError(
                f"unknown keywords {', '.join(unknown)}; generation takes {', '.join(known)}"
            )
        if not given.get("max_new_tokens"):
            raise TypeError("max_new_tokens is missing: how many tokens a response may have")
        stops: Sequence = given.get("stop_token_ids") or stop_sequences([], tokenizer, actor)
        if isinstance(stops[0], int):
            stops = [stops]
        sampling = Sampling(**{name: given[name] for name in SAMPLING if name in given})
        return cls([list(stop) for stop in stops], given["max_new_tokens"], sampling)
