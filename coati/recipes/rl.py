"""PPO and GRPO: rollouts, rewards, advantages from a critic or from groups, clipped policy
update."""

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from coati.cli.online_settings import (
    OnlineSettings,
    PPOSettings,
    UpdateSettings,
)
from coati.cli.update_flags import CLIP
from coati.dataset.load.collator import (
    DataCollatorForPromptDataset,
    DataCollatorForSupervisedDataset,
)
from coati.dataset.load.epoch_order import EpochOrder
from coati.dataset.load.loader import EvaluationLoader, GlobalBatchLoader
from coati.experience_buffer.batch_sizes import optimizer_steps_per_pass
from coati.experience_maker.advantage_registry import GROUP_METHODS
from coati.experience_maker.rollout_batch import ExperienceSettings
from coati.experience_maker.rollouts.make_rollout import make_rollout
from coati.experience_maker.scoring import Scorer, no_scores
from coati.models.generation.end_tokens import stop_sequences
from coati.models.generation.sampling import Sampling
from coati.models.policy_loss import LossAggregation
from coati.models.policy_registry import CISPO_CAP, POLICY_LOSSES, SAPO_TAU
from coati.models.rollout_correction import RolloutCorrection
from coati.models.surrogate_loss import SurrogateSettings
from coati.parallel.agreement import agree
from coati.parallel.checkpoint import RunningState, buffer_states_by_rank, rollouts_by_rank
from coati.parallel.engine import Engine
from coati.parallel.inference_model import InferenceModel
from coati.recipes import build, data, finish
from coati.recipes.build import Trained
from coati.recipes.data_checks import (
    check_positions,
    check_prompts,
    check_reader_positions,
    check_rollout_positions,
)
from coati.recipes.dry_run import rl_dry_run
from coati.recipes.extras import NO_EXTRAS, Extras
from coati.recipes.resume import running_state
from coati.recipes.reward_sets import (
    RewardFunctions,
    ask_for_groups,
    check_groups,
    check_rewarded,
    pass_at,
    reward_functions,
)
from coati.recipes.rl_environment import check_dialogues, environment_of, environment_rollout
from coati.recipes.rl_models import (
    load_actor,
    load_critic,
    load_reference,
    load_reward_model,
    readers,
)
from coati.recipes.rollout_options import check_correctable, engine_options
from coati.recipes.run import PreparedRows, Run, start
from coati.recipes.run_dir import refuse_shorter
from coati.recipes.same_run import SAME_ROWS, rows_facts
from coati.trainer import OLTrainer
from coati.trainer.episodes import Episodes, update_shape, why_over
from coati.trainer.monitor.rl_checks import RLChecks
from coati.trainer.policy_objective import PolicySettings
from coati.trainer.rl_assembly import (
    BufferSettings,
    KLSettings,
    RLSettings,
    ValueSettings,
    assemble_rl,
    linear_annealing,
)
from coati.utils.phases import phase


@dataclass(frozen=True)
class RolloutData:
    """The rows of a run: prompts to train on and to evaluate on, and supervised rows, and where in
    the prompts it starts."""

    prompts: PreparedRows
    evaluation: PreparedRows | None
    ptx: PreparedRows | None
    order: EpochOrder
    state: RunningState


def main(settings: OnlineSettings, extras: Extras = NO_EXTRAS) -> None:
    """Train with a critic where ``settings`` has one (PPO), else with the group method that they
    name (GRPO and its variants)."""
    run: Run[Any] = start(settings, extras)
    functions = reward_functions(run)
    environment = environment_of(run)
    ask_for_groups(run)
    rows = load_data(run, functions)
    episodes = episodes_of(settings)
    buffer_state = buffer_state_of(run)
    total_steps = episodes.total_steps_from(
        rows.state, inside_episode(buffer_state, rows.state, settings)
    )
    refuse_shorter(settings.output, episodes.num_episodes, "episode")
    actor = load_actor(run, total_steps)
    stops = stop_sequences(run.template.stop_ids, run.tokenizer, actor.engine.model)
    models: dict[str, Trained] = {"actor": actor}
    if isinstance(settings, PPOSettings):
        models["critic"] = load_critic(run, actor, total_steps)
    reward_model = load_reward_model(run, actor)
    rollout = rollout_of(run, actor, stops)
    check_correctable(settings, rollout)
    parts = assemble_rl(
        rl_settings(run, episodes, stops),
        actor=actor.engine,
        critic=models["critic"].engine if "critic" in models else None,
        reference=load_reference(run, actor),
        rollout=rollout,
        scorer=scorer_of(run, reward_model, functions),
        tokenizer=run.tokenizer,
        environment=environment_rollout(run, environment, actor, rollout, stops),
    )
    trainer = OLTrainer(
        **parts,
        schedule=settings.schedule,
        state=rows.state,
        assets={name: model.assets for name, model in models.items()},
        buffer_state=buffer_state,
        rollouts=rollouts_ahead_of(run),
        checks=_checks(run),
        pass_at=pass_at(run, functions),
        settings=run.flags,
        callbacks=() if settings.output.dry_run else extras.callbacks,
    )
    with closing(parts["maker"].rollout):
        train(run, trainer, models, rows)


def train(run: Run[Any], trainer: OLTrainer, models: dict[str, Trained], rows: RolloutData) -> None:
    """The run itself, or its rehearsal. ``models``: those that are trained, by name."""
    actor = models["actor"]
    prompts = _prompt_loader(run, actor.engine, rows)
    ptx = _ptx_loader(run, actor.engine, rows.ptx)
    output = run.settings.output
    finish.rehearse(run, {name: (one.engine, one.assets) for name, one in models.items()})
    if output.dry_run:
        return rl_dry_run(run, trainer, prompts, ptx)
    evaluation = _evaluation_loader(run, actor.engine, rows.evaluation)
    trainer.run(prompts, evaluation, ptx, **output.trackers)
    finish.save_models_of(run, trainer)


def scorer_of(
    run: Run[OnlineSettings], reward_model: InferenceModel | None, functions: RewardFunctions | None
) -> Callable[..., Any]:
    """What scores responses: reward model, functions, or the sum of both."""
    rollout = run.settings.rollout
    other = rollout.environment or rollout.offline_groups
    if reward_model is None and functions is None and other:
        return no_scores
    return Scorer(reward_model, functions, run.settings.rollout.logits_forward_batch_size)


@phase("reading the rows")
def load_data(run: Run[OnlineSettings], functions: RewardFunctions | None) -> RolloutData:
    """The rows of the run, the same on every rank. Raises ValueError for what is wrong with them,
    RanksDiffer for ranks that read others, before a model is loaded."""
    return agree(_facts, lambda: _load_data(run, functions), remedy=SAME_ROWS)


def _facts(rows: RolloutData) -> dict[str, Any]:
    sets = {
        "--prompt_dataset": rows.prompts,
        "--eval_prompt_dataset": rows.evaluation,
        "--ptx_dataset": rows.ptx,
    }
    facts = rows_facts(**{name: found and found.rows for name, found in sets.items()})
    return facts | {"step": rows.state.step}


def _load_data(run: Run[OnlineSettings], functions: RewardFunctions | None) -> RolloutData:
    if run.template is None:
        raise ValueError(
            "no conversation template says how a response ends; name one with "
            "--conversation_template_config"
        )
    prompts, evaluation = data.training_and_evaluation_rows(run, "prompt", "prompt_dataset")
    ptx = data.ptx_rows(run)
    check_prompts(run, prompts, ptx)
    check_positions(run, ptx, "ptx_dataset")
    check_rollout_positions(run, prompts)
    check_rollout_positions(run, evaluation, "eval_prompt_dataset")
    for reader in readers(run):
        check_reader_positions(run, prompts, reader.flag, reader.path)
    check_groups(run, prompts)
    check_rewarded(prompts, functions)
    check_rewarded(evaluation, functions, "eval_prompt_dataset")
    check_dialogues(run, prompts)
    check_dialogues(run, evaluation, "eval_prompt_dataset")
    state = running_state(run.resume, run.settings, prompts.rows)
    order = data.epoch_order(run, prompts)
    rollout = run.settings.rollout
    size = rollout.num_collect_steps * rollout.experience_batch_size * run.data_parallel_size
    if rollout.num_episodes * size > order.count(0) - size:  # an epoch's end is reached
        flags = "--num_collect_steps x --experience_batch_size"
        data.say_left_out(order.count(0), size, "prompts", flags)
    return RolloutData(prompts, evaluation, ptx, order, state)


def episodes_of(settings: OnlineSettings) -> Episodes:
    """How long the run is, and how its episodes are divided into optimizer steps."""
    rollout = settings.rollout
    update = settings.update
    if update.buffer_limit:
        steps = update.buffer_limit // (update.train_batch_size * update.accumulation_steps)
    else:
        steps = optimizer_steps_per_pass(
            rollout.num_collect_steps,
            rollout.experience_batch_size,
            update.train_batch_size,
            update.accumulation_steps,
            settings.rows_per_prompt,
        )
    return Episodes(
        rollout.num_episodes,
        update.num_update_steps,
        steps_per_pass=steps,
        temperature=_temperature(settings),
        seed=settings.seed,
        sample_interval=rollout.sample_interval,
        ahead=rollout.rollouts_ahead,
        refill_rounds=rollout.dynamic_sampling,
    )


def _temperature(settings: OnlineSettings) -> Callable[[int], float]:
    """Episode -> temperature, annealed linearly between a sixth (at most 100) and half (at most
    600) of the episodes."""
    sampling = settings.sampling
    episodes = settings.rollout.num_episodes
    return linear_annealing(
        sampling.initial_temperature,
        sampling.final_temperature,
        min(100, episodes // 6),
        min(600, episodes // 2),
    )


def rl_settings(run: Run[OnlineSettings], episodes: Episodes, stops: list[list[int]]) -> RLSettings:
    """What :func:`~coati.trainer.rl_assembly.assemble_rl` is told; ``stops`` end a response."""
    settings = run.settings
    kl = settings.kl
    update = settings.update
    advantage = settings.advantage
    mode = GROUP_METHODS[advantage.algo].loss_agg_mode if advantage.algo else "token-mean"
    mode = update.loss_agg_mode or POLICY_LOSSES[update.policy_loss].loss_agg_mode or mode
    policy = PolicySettings(
        surrogate=_surrogate(update),
        skip_threshold=update.skip_threshold,
        loss_agg=LossAggregation(mode, settings.rollout.max_seq_len),
        kl_coef=kl.kl_coef if kl.kl_in == "loss" else 0.0,
        kl_estimator=kl.kl_estimator,
        entropy_coef=update.entropy_coef,
        loss=run.extras.loss,
        correction=_correction(update),
    )
    critic = settings.critic if isinstance(settings, PPOSettings) else None
    return RLSettings(
        _experience(run, stops),
        policy=policy,
        value=ValueSettings() if critic is None else ValueSettings(critic.value_clip),
        kl=KLSettings(kl.kl_coef, kl.kl_target, kl.kl_horizon),
        buffer=BufferSettings(update.train_batch_size, update.buffer_limit),
        episodes=episodes,
        ptx_coef=settings.ptx.ptx_coef,
    )


def _surrogate(update: UpdateSettings) -> SurrogateSettings:
    positive, negative = update.sapo_tau or SAPO_TAU
    return SurrogateSettings(
        update.policy_loss,
        update.clip_eps_low or CLIP,
        update.clip_eps_high or CLIP,
        update.dual_clip,
        update.cispo_cap or CISPO_CAP,
        (positive, negative),
    )


def _correction(update: UpdateSettings) -> RolloutCorrection:
    low, high = update.rollout_is_mask or (0.0, math.inf)
    keep = None if update.rollout_is_mask is None else (low, high)
    return RolloutCorrection(update.rollout_is, update.rollout_is_cap, keep)


def _experience(run: Run[OnlineSettings], stops: list[list[int]]) -> ExperienceSettings:
    settings = run.settings
    rollout = settings.rollout
    advantage = settings.advantage
    reward = settings.reward
    return ExperienceSettings(
        max_new_tokens=rollout.max_seq_len,
        stop_sequences=stops,
        method=advantage.algo,
        num_generations=rollout.num_generations,
        kl_estimator=settings.kl.kl_estimator,
        kl_in=settings.kl.kl_in,
        gamma=advantage.gamma,
        lam=advantage.lam,
        reward_clip=reward.reward_clip or None,
        reward_at=advantage.reward_at,
        reward_normalization=reward.reward_normalization,
        missing_eos_penalty=reward.missing_eos_penalty,
        overlong_buffer_len=advantage.overlong_buffer_len or None,
        mask_truncated_completions=advantage.mask_truncated_completions,
        whiten=not advantage.no_whiten_advantages,
        rollout_batch_size=rollout.inference_batch_size,
        forward_batch_size=rollout.logits_forward_batch_size,
        seed=settings.seed,
        offline_groups=rollout.offline_groups,
    )


def rollout_of(run: Run[OnlineSettings], actor: Trained, stops: list[list[int]]) -> Any:
    """The engine that samples, as ``--rollout_engine`` says; ``stops`` end a response."""
    rollout = run.settings.rollout
    sampling = run.settings.sampling
    return make_rollout(
        rollout.rollout_engine,
        actor.engine,
        elsewhere=engine_options(run, actor.assets.config),
        sampling=Sampling(
            True, 1.0, sampling.top_k or None, sampling.top_p, sampling.repetition_penalty
        ),
        stop_sequences=stops,
        max_new_tokens=rollout.max_seq_len,
        pad_token_id=run.tokenizer.pad_token_id,
    )


def buffer_state_of(run: Run[OnlineSettings]) -> dict[str, Any] | None:
    """The experience buffer of a run that was stopped inside an episode."""
    resume = run.resume
    if resume.folder is None:
        return None
    return buffer_states_by_rank(resume.folder, resume.state, tp=run.options.tp)


def rollouts_ahead_of(run: Run[OnlineSettings]) -> dict[str, Any] | None:
    """The responses that a run had asked for ahead when it was saved."""
    resume = run.resume
    if resume.folder is None:
        return None
    return rollouts_by_rank(resume.folder, resume.state, tp=run.options.tp)


def inside_episode(
    buffer_state: dict[str, Any] | None, state: RunningState, settings: OnlineSettings
) -> bool:
    """Whether the run goes on inside an episode."""
    if buffer_state is None:
        return False
    shape = update_shape(episodes_of(settings), settings.update.train_batch_size)
    kl_in_loss = settings.kl.kl_in == "loss" and settings.kl.kl_coef > 0
    return why_over(buffer_state, state.trainer, shape, kl_in_loss) is None


def _checks(run: Run[OnlineSettings]) -> RLChecks:
    settings = run.settings
    sampling = settings.sampling
    reward = settings.reward
    return RLChecks(
        top_k=sampling.top_k or None,
        top_p=sampling.top_p,
        repetition_penalty=sampling.repetition_penalty,
        ptx_coef=settings.ptx.ptx_coef,
        kl_target=settings.kl.kl_target,
        reward_clip=reward.reward_clip or None,
        reward_normalization=reward.reward_normalization,
        max_new_tokens=settings.rollout.max_seq_len,
        rollouts_ahead=settings.rollout.rollouts_ahead,
        rollout_is=settings.update.rollout_is,
        fp32=run.options.precision == "fp32",
    )


def _prompt_collator(run: Run[OnlineSettings]) -> DataCollatorForPromptDataset:
    settings = run.settings
    sources = bool(settings.reward.source_rewards)
    return DataCollatorForPromptDataset(run.tokenizer, settings.data.longest_prompt, sources)


def _prompt_loader(run: Run[OnlineSettings], actor: Engine, rows: RolloutData) -> GlobalBatchLoader:
    """The prompts of an episode at a time."""
    rollout = run.settings.rollout
    return GlobalBatchLoader(
        rows.prompts.rows,
        _prompt_collator(run),
        batch_size=rollout.experience_batch_size,
        accumulation_steps=rollout.num_collect_steps,
        epoch_order=rows.order,
        **build.dp_share(actor),
    )


def _evaluation_loader(
    run: Run[OnlineSettings], actor: Engine, evaluation: PreparedRows | None
) -> EvaluationLoader | None:
    if evaluation is None:
        return None
    size = run.settings.rollout.experience_batch_size
    share = build.dp_share(actor)
    return EvaluationLoader(evaluation.rows, _prompt_collator(run), batch_size=size, **share)


def _ptx_loader(
    run: Run[OnlineSettings], actor: Engine, ptx: PreparedRows | None
) -> GlobalBatchLoader | None:
    """The supervised rows of an optimizer step at a time."""
    if ptx is None:
        return None
    settings = run.settings
    return GlobalBatchLoader(
        ptx.rows,
        build.collator(run, DataCollatorForSupervisedDataset),
        batch_size=settings.ptx.ptx_batch_size,
        accumulation_steps=settings.update.accumulation_steps,
        seed=settings.seed,
        **build.dp_share(actor),
    )
