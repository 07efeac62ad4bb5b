"""PPO around boosted models, for notebooks."""

from typing import Any

from torch import nn

from coati.experience_maker.rollout_batch import ExperienceSettings
from coati.parallel.engine import Engine
from coati.trainer.boosted_rl import BoostedRLTrainer, Generation, policy_settings
from coati.trainer.rl_assembly import BufferSettings, KLSettings, RLSettings, ValueSettings
from coati.trainer.schedule import RunSchedule


class PPOTrainer(BoostedRLTrainer):
    """Proximal policy optimization with a critic (arXiv 1707.06347, 2203.02155); see
    :class:`~coati.trainer.boosted_rl.BoostedRLTrainer` for the arguments that are not named here.

    Args:
        value_clip: clip range of values around those of the rollout.
        vf_coef: coefficient of the critic's loss.
        gamma, lam: discount and lambda of generalized advantage estimation (arXiv 1506.02438);
            advantages are whitened over an episode.
        policy_loss: a name of :data:`~coati.models.policy_registry.POLICY_LOSSES`.
    """

    def __init__(
        self,
        actor_booster: Any,
        critic_booster: Any,
        actor: nn.Module,
        critic: nn.Module,
        reward_model: Any,
        initial_model: nn.Module | None,
        actor_optim: Any,
        critic_optim: Any,
        actor_lr_scheduler: Any = None,
        critic_lr_scheduler: Any = None,
        tokenizer: Any = None,
        kl_coef: float = 0.1,
        ptx_coef: float = 0.9,
        train_batch_size: int = 8,
        buffer_limit: int = 0,
        buffer_cpu_offload: bool = True,
        eps_clip: float = 0.2,
        vf_coef: float = 1.0,
        value_clip: float = 0.2,
        accumulation_steps: int = 1,
        save_interval: int = 0,
        save_dir: str | None = None,
        *,
        gamma: float = 1.0,
        lam: float = 0.95,
        seed: int = 42,
        inference_batch_size: int | None = None,
        logits_forward_batch_size: int | None = None,
        policy_loss: str = "ppo",
        entropy_coef: float = 0.0,
        rollouts_ahead: int = 0,
        **generate_kwargs: Any,
    ) -> None:
        generation = Generation.of(tokenizer, actor, generate_kwargs)
        experience = ExperienceSettings(
            generation.max_new_tokens,
            generation.stop_sequences,
            gamma=gamma,
            lam=lam,
            rollout_batch_size=inference_batch_size,
            forward_batch_size=logits_forward_batch_size,
            seed=seed,
        )
        settings = RLSettings(
            experience,
            policy=policy_settings(policy_loss, eps_clip, entropy_coef=entropy_coef),
            value=ValueSettings(value_clip, vf_coef),
            kl=KLSettings(kl_coef),
            buffer=BufferSettings(train_batch_size, buffer_limit, buffer_cpu_offload),
            ptx_coef=ptx_coef,
        )
        self._ahead = rollouts_ahead
        actor_engine = Engine(actor_booster, actor, actor_optim, actor_lr_scheduler)
        critic_engine = Engine(critic_booster, critic, critic_optim, critic_lr_scheduler)
        models = (actor_engine, critic_engine, reward_model, initial_model, tokenizer)
        schedule = RunSchedule(save_dir, save_interval)
        self._assemble(settings, *models, generation.sampling, schedule, accumulation_steps)
