"""PPO and GRPO from what ``booster.boost`` returned, with the keywords of the first system, for
notebooks.

The training scripts have more to say and put an :class:`~coati.trainer.online.OLTrainer` together
part by part.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from coati.experience_buffer.batch_sizes import windows_per_episode
from coati.experience_buffer.buffer import NaiveExperienceBuffer
from coati.experience_maker.advantage_registry import GROUP_METHODS
from coati.experience_maker.maker import NaiveExperienceMaker
from coati.experience_maker.rollout import ModelRollout
from coati.experience_maker.rollout_batch import ExperienceSettings
from coati.experience_maker.running_moments import KLController
from coati.models.policy_loss import Normalization
from coati.parallel.engine import Engine
from coati.parallel.inference_model import InferenceModel
from coati.trainer.global_batches import as_windows
from coati.trainer.online import Episodes, OLTrainer
from coati.trainer.policy_objective import PolicySettings
from coati.trainer.rl_parts import generation_of, scorer_of
from coati.trainer.schedule import RunSchedule


def annealing(first: float, last: float, start: int, end: int) -> Callable[[int], float]:
    """Episode -> temperature: ``first`` up to episode ``start``, ``last`` from ``end`` on, a
    straight line between."""

    def temperature(episode: int) -> float:
        done = min(max((episode - start) / max(end - start, 1), 0.0), 1.0)
        return first + (last - first) * done

    return temperature


class BoostedTrainer(OLTrainer):
    """What the two have in common.

    Args: booster, model, optimizer and schedule (of actor and critic): as ``booster.boost`` took
        and returned them. reward_model: a :class:`~coati.models.reward_model.RewardModel`,
        :class:`~coati.rewards.scorer.Rewards`, or
        :class:`~coati.models.rlvr_reward_model.RLVRRewardModel`. initial_model: the plain frozen
        policy that KL is measured from; None: no KL. tokenizer: its ``eos_token_id`` ends responses
        unless ``stop_token_ids`` says what does. train_batch_size: rows of a micro-batch;
        ``buffer_limit``: the newest rows that are kept, 0: all. generate_kwargs:
        ``max_new_tokens``, which is needed, ``stop_token_ids`` (one sequence of ids or a list of
        them), ``do_sample``, ``temperature``, ``top_k``, ``top_p``, ``repetition_penalty``.

    Raises:
        TypeError: for a keyword that is not known, or without ``max_new_tokens``.
        ValueError: where the plugin cannot sample.
    """

    _method: str | None = None  # of GROUP_METHODS

    def _build(
        self,
        actor: Engine,
        critic: Engine | None,
        reward_model: Any,
        initial_model: nn.Module | None,
        tokenizer: Any,
        *,
        kl_coef: float,
        train_batch_size: int,
        buffer_limit: int,
        buffer_cpu_offload: bool,
        accumulation_steps: int,
        save_interval: int,
        save_dir: str | None,
        experience: dict[str, Any],
        trainer: dict[str, Any],
        generate_kwargs: dict[str, Any],
    ) -> None:
        self._accumulation_steps, self._seed = accumulation_steps, experience.get("seed", 42)
        stops, length, sampling = generation_of(tokenizer, generate_kwargs)
        self._temperature = annealing(*[sampling.temperature] * 2, 0, 1)
        rollout = ModelRollout(
            actor,
            sampling=sampling,
            stop_sequences=stops,
            max_new_tokens=length,
            pad_token_id=tokenizer.pad_token_id,
        )
        settings = ExperienceSettings(length, stops, method=self._method, **experience)
        maker = NaiveExperienceMaker(
            actor,
            rollout,
            scorer_of(reward_model, settings.forward_batch_size),
            tokenizer,
            settings,
            reference=None if initial_model is None else InferenceModel.plain(initial_model),
            critic=critic,
            kl=KLController(kl_coef),
        )
        buffer = NaiveExperienceBuffer(train_batch_size, buffer_limit, buffer_cpu_offload)
        schedule = RunSchedule(save_dir, save_interval)
        super().__init__(
            actor, maker, buffer, Episodes(), critic=critic, schedule=schedule, **trainer
        )

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
        eval_prompt_dataloader: Any = None,
    ) -> None:
        """Train.

        Args: num_collect_steps: batches of ``prompt_dataloader`` that are answered in an episode.
            num_update_steps: passes over the answers. prompt_dataloader: a DataLoader of equal
            batches, each ``input_ids`` and ``attention_mask`` (B, P) padded on the left, with
            ``gt_answer``, a list of B, where a reward function asks for it. pretrain_dataloader: of
            supervised rows, for ``ptx_coef``. eval_prompt_dataloader: an
            :class:`~coati.dataset.load.loader.EvaluationLoader` of other prompts.

        Raises: ValueError: for batches that are no whole number of optimizer steps, and a
            ``ptx_coef`` without rows.
        """
        if self.ptx_coef and pretrain_dataloader is None:
            raise ValueError(
                f"ptx_coef is {self.ptx_coef:g}, but there is no pretrain_dataloader; give one, or "
                "set ptx_coef to 0"
            )
        prompts = as_windows(prompt_dataloader, num_collect_steps)
        settings = self.maker.settings
        windows = windows_per_episode(
            num_collect_steps,
            prompt_dataloader.batch_size,
            self.buffer.sample_batch_size,
            self._accumulation_steps,
            settings.num_generations,
        )
        self.episodes = Episodes(
            num_episodes, num_update_steps, windows, self._temperature, self._seed
        )
        supervised = (
            None
            if pretrain_dataloader is None
            else as_windows(pretrain_dataloader, self._accumulation_steps)
        )
        self.run(prompts, eval_prompt_dataloader, supervised, log_dir, use_wandb)


class PPOTrainer(BoostedTrainer):
    """Proximal policy optimization with a critic (arXiv 1707.06347, 2203.02155); see
    :class:`BoostedTrainer`.

    Args: ptx_coef: c of (1 - c) x policy loss + c x supervised loss; 0 where there are no
        supervised rows. eps_clip: of the ratio of probabilities; ``value_clip``: of a value's
        change; ``vf_coef``: of the critic's loss. gamma, lam: of generalized advantage estimation
        (arXiv 1506.02438); advantages are whitened over an episode.
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
        **generate_kwargs: Any,
    ) -> None:
        sizes = {
            "rollout_batch_size": inference_batch_size,
            "forward_batch_size": logits_forward_batch_size,
        }
        self._build(
            Engine(actor_booster, actor, actor_optim, actor_lr_scheduler),
            Engine(critic_booster, critic, critic_optim, critic_lr_scheduler),
            reward_model,
            initial_model,
            tokenizer,
            kl_coef=kl_coef,
            train_batch_size=train_batch_size,
            buffer_limit=buffer_limit,
            buffer_cpu_offload=buffer_cpu_offload,
            accumulation_steps=accumulation_steps,
            save_interval=save_interval,
            save_dir=save_dir,
            experience={"gamma": gamma, "lam": lam, "seed": seed} | sizes,
            trainer={
                "policy": PolicySettings(eps_clip, eps_clip),
                "value_clip": value_clip,
                "vf_coef": vf_coef,
                "ptx_coef": ptx_coef,
            },
            generate_kwargs=generate_kwargs,
        )


class GRPOTrainer(BoostedTrainer):
    """Policy gradient with advantages from groups of responses instead of a critic (arXiv
    2402.03300); see :class:`BoostedTrainer`.

    Args: num_generation: responses to each prompt. temperature_annealing_config:
        ``start_temperature`` up to episode ``annealing_warmup_steps``,
            ``end_temperature`` from episode ``annealing_steps`` on.
        algo: a name of :data:`~coati.experience_maker.advantage_registry.GROUP_METHODS`.
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
        seed: int = 42,
        **generate_kwargs: Any,
    ) -> None:
        method, self._method = GROUP_METHODS[algo], algo
        sizes = {
            "rollout_batch_size": inference_batch_size,
            "forward_batch_size": logits_forward_batch_size,
        }
        normalization = Normalization(method.normalization, generate_kwargs.get("max_new_tokens"))
        clip = max(eps_clip, method.clip_high)  # dapo clips higher above than below
        self._build(
            Engine(actor_booster, actor, actor_optim, actor_lr_scheduler),
            None,
            reward_model,
            initial_model,
            tokenizer,
            kl_coef=kl_coef,
            train_batch_size=train_batch_size,
            buffer_limit=buffer_limit,
            buffer_cpu_offload=buffer_cpu_offload,
            accumulation_steps=accumulation_steps,
            save_interval=save_interval,
            save_dir=save_dir,
            experience={
                "num_generations": num_generation,
                "kl_in": "loss",
                "kl_estimator": "k3",
                "seed": seed,
            }
            | sizes,
            trainer={
                "policy": PolicySettings(
                    eps_clip, clip, normalization=normalization, kl_coef=kl_coef
                ),
                "ptx_coef": ptx_coef,
            },
            generate_kwargs=generate_kwargs,
        )
        if temperature_annealing_config is not None:
            first, last, start, end = (
                temperature_annealing_config[name]
                for name in (
                    "start_temperature",
                    "end_temperature",
                    "annealing_warmup_steps",
                    "annealing_steps",
                )
            )
            self._temperature = annealing(first, last, start, end)
