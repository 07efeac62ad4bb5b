"""GRPO and the other methods without a critic around boosted models, for notebooks."""

from collections.abc import Callable
from typing import Any

from torch import nn

from coati.experience_maker.advantage_registry import GROUP_METHODS
from coati.experience_maker.rollout_batch import ExperienceSettings
from coati.models.policy_loss import LossAggregation
from coati.parallel.engine import Engine
from coati.trainer.boosted_rl import BoostedRLTrainer, Generation, policy_settings
from coati.trainer.policy_objective import PolicySettings
from coati.trainer.rl_assembly import BufferSettings, KLSettings, RLSettings, linear_annealing
from coati.trainer.schedule import RunSchedule


class GRPOTrainer(BoostedRLTrainer):
    """Policy gradient with group-relative advantages instead of a critic (arXiv 2402.03300); see
    :class:`~coati.trainer.boosted_rl.BoostedRLTrainer` for the arguments that are not named here.

    Args:
        num_generation: responses to each prompt.
        temperature_annealing_config: ``start_temperature`` up to episode
            ``annealing_warmup_steps``, ``end_temperature`` from episode ``annealing_steps`` on.
        algo: a name of :data:`~coati.experience_maker.advantage_registry.GROUP_METHODS`.
        policy_loss: a name of :data:`~coati.models.policy_registry.POLICY_LOSSES`.
    """

    def __init__(
        self,
        actor_booster: Any,
        actor: nn.Module,
        reward_model: Any,
        initial_model: nn.Module | None,
        actor_optim: Any,
        actor_lr_scheduler: Any = None,
        tokenizer: Any = None,
        kl_coef: float = 0.1,
        ptx_coef: float = 0.9,
        train_batch_size: int = 8,
        buffer_limit: int = 0,
        buffer_cpu_offload: bool = True,
        eps_clip: float = 0.2,
        accumulation_steps: int = 1,
        save_interval: int = 0,
        save_dir: str | None = None,
        num_generation: int = 8,
        inference_batch_size: int | None = None,
        logits_forward_batch_size: int | None = None,
        temperature_annealing_config: dict[str, float] | None = None,
        *,
        algo: str = "grpo",
        policy_loss: str = "ppo",
        entropy_coef: float = 0.0,
        rollouts_ahead: int = 0,
        seed: int = 42,
        **generate_kwargs: Any,
    ) -> None:
        generation = Generation.of(tokenizer, actor, generate_kwargs)
        experience = ExperienceSettings(
            generation.max_new_tokens,
            generation.stop_sequences,
            method=algo,
            num_generations=num_generation,
            kl_estimator="k3",
            kl_in="loss",
            rollout_batch_size=inference_batch_size,
            forward_batch_size=logits_forward_batch_size,
            seed=seed,
        )
        longest = generation.max_new_tokens
        policy = _policy(algo, policy_loss, eps_clip, longest, kl_coef, entropy_coef)
        settings = RLSettings(
            experience,
            policy=policy,
            kl=KLSettings(kl_coef),
            buffer=BufferSettings(train_batch_size, buffer_limit, buffer_cpu_offload),
            ptx_coef=ptx_coef,
        )
        self._ahead = rollouts_ahead
        actor_engine = Engine(actor_booster, actor, actor_optim, actor_lr_scheduler)
        models = (actor_engine, None, reward_model, initial_model, tokenizer)
        schedule = RunSchedule(save_dir, save_interval)
        self._assemble(settings, *models, generation.sampling, schedule, accumulation_steps)
        if temperature_annealing_config is not None:
            self._temperature = _annealing(temperature_annealing_config)


def _policy(
    algo: str, name: str, clip: float, longest: int, kl_coef: float, entropy_coef: float
) -> PolicySettings:
    method = GROUP_METHODS[algo]
    return policy_settings(
        name,
        clip,
        max(clip, method.clip_high),  # dapo clips higher above than below
        LossAggregation(method.loss_agg_mode, longest),
        kl_coef=kl_coef,
        entropy_coef=entropy_coef,
    )


def _annealing(config: dict[str, float]) -> Callable[[int], float]:
    return linear_annealing(
        config["start_temperature"],
        config["end_temperature"],
        config["annealing_warmup_steps"],
        config["annealing_steps"],
    )
