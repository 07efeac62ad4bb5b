"""From the flags of PPO and GRPO to their parts: rewards, experience maker, episodes, loaders."""

from argparse import Namespace
from typing import Any

from coati.dataset.chat.conversation import Conversation
from coati.dataset.load.collator import (
    DataCollatorForPromptDataset,
    DataCollatorForSupervisedDataset,
)
from coati.dataset.load.epoch_order import EpochOrder
from coati.dataset.load.loader import EvaluationLoader, GlobalBatchLoader
from coati.experience_buffer.batch_sizes import optimizer_steps_per_pass
from coati.experience_maker.advantage_registry import GROUP_METHODS
from coati.experience_maker.rollout import make_rollout
from coati.experience_maker.rollout_batch import ExperienceSettings
from coati.experience_maker.scoring import Scorer
from coati.models.generation.loop import Sampling
from coati.models.policy_loss import LossAggregation
from coati.parallel.checkpoint import RunningState, buffer_states_by_rank
from coati.parallel.engine import Engine
from coati.parallel.inference_model import InferenceModel
from coati.parallel.plugins import ParallelOptions
from coati.recipes import rl_models
from coati.recipes.data import evaluation_rows
from coati.recipes.prompt_data_checks import check_gt_answers, check_prompts, prompt_rows, ptx_rows
from coati.recipes.resume import Resume
from coati.rewards.scorer import Rewards
from coati.trainer.monitor.rl_checks import RLChecks
from coati.trainer.online import Episodes
from coati.trainer.policy_objective import PolicySettings
from coati.trainer.rl_assembly import (
    BufferSettings,
    KLSettings,
    RLSettings,
    ValueSettings,
    assemble_rl,
    linear_annealing,
)
from coati.trainer.schedule import RunSchedule


def rewards(args: Namespace, template: Conversation | None) -> Rewards | None:
    """The reward functions of ``--reward_functions``."""
    if not args.reward_functions:
        return None
    tags = None if template is None else template.response_format_tags
    return Rewards(
        args.reward_functions, args.reward_weights or None, tags, args.reward_timeout or None
    )


def rows(
    args: Namespace,
    options: ParallelOptions,
    tokenizer: Any,
    template: Any,
    functions: Rewards | None,
) -> tuple:
    """Prompts to train on, prompts to evaluate on, and supervised rows; the last two None where
    there are none. Raises ValueError for what is wrong with them, before a model is loaded."""
    if template is None:
        raise ValueError(
            "no conversation template says how a response ends; name one with "
            "--conversation_template_config"
        )
    prompts, ptx = prompt_rows(args, tokenizer, template), ptx_rows(args, tokenizer, template)
    evaluation = evaluation_rows(args, tokenizer, template, "prompt")
    check_prompts(args, options, prompts, ptx)
    check_gt_answers(prompts, functions)
    check_gt_answers(evaluation, functions, "eval_prompt_dataset")
    return prompts, evaluation, ptx


def episodes(args: Namespace) -> Episodes:
    """How long the run is."""
    step = args.train_batch_size * args.accumulation_steps
    steps = args.buffer_limit // step or optimizer_steps_per_pass(
        args.num_collect_steps,
        args.experience_batch_size,
        args.train_batch_size,
        args.accumulation_steps,
        getattr(args, "num_generations", 1),
    )
    return Episodes(
        args.num_episodes,
        args.num_update_steps,
        steps,
        _temperature(args),
        args.seed,
        args.sample_interval,
    )


def _temperature(args: Namespace):
    """Episode -> temperature: fixed, or from --initial_temperature to --final_temperature in a
    straight line between a sixth (at most 100) and half (at most 600) of the episodes."""
    if "initial_temperature" not in args:
        return lambda episode: args.temperature
    start, end = min(100, args.num_episodes // 6), min(600, args.num_episodes // 2)
    return linear_annealing(args.initial_temperature, args.final_temperature, start, end)


def rl_settings(args: Namespace, template: Conversation, length: Episodes) -> RLSettings:
    """The settings of the run; ``length``: :func:`episodes`."""
    mode = GROUP_METHODS[args.algo].loss_agg_mode if "algo" in args else "token-mean"
    experience = ExperienceSettings(
        max_new_tokens=args.max_seq_len,
        stop_sequences=template.stop_ids,
        method=getattr(args, "algo", None),
        num_generations=getattr(args, "num_generations", 1),
        kl_estimator=args.kl_estimator,
        kl_in=args.kl_in,
        gamma=getattr(args, "gamma", 1.0),
        lam=getattr(args, "lam", 0.95),
        reward_clip=args.reward_clip or None,
        reward_at=getattr(args, "reward_at", "last"),
        reward_normalization=args.reward_normalization,
        missing_eos_penalty=args.missing_eos_penalty,
        overlong_buffer_len=getattr(args, "overlong_buffer_len", 0) or None,
        mask_truncated_completions=getattr(args, "mask_truncated_completions", False),
        whiten=not getattr(args, "no_whiten_advantages", False),
        rollout_batch_size=args.inference_batch_size,
        forward_batch_size=args.logits_forward_batch_size,
        seed=args.seed,
    )
    policy = PolicySettings(
        args.clip_eps_low,
        args.clip_eps_high,
        args.skip_threshold,
        LossAggregation(mode, args.max_seq_len),
        args.kl_coef if args.kl_in == "loss" else 0.0,
        args.kl_estimator,
    )
    return RLSettings(
        experience,
        policy=policy,
        value=ValueSettings(getattr(args, "value_clip", 0.2)),
        kl=KLSettings(args.kl_coef, args.kl_target, args.kl_horizon),
        buffer=BufferSettings(args.train_batch_size, args.buffer_limit),
        episodes=length,
        ptx_coef=args.ptx_coef,
    )


def parts(
    args: Namespace,
    options: ParallelOptions,
    tokenizer: Any,
    template: Conversation,
    functions: Rewards | None,
    length: Episodes,
    actor: Engine,
    critic: Engine | None = None,
) -> dict[str, Any]:
    """The trainer's arguments that follow from settings and models, with reward model and reference
    loaded."""
    settings = rl_settings(args, template, length)
    reward_model = rl_models.reward_engine(args, options, tokenizer)
    judge = None
    if reward_model is not None:
        judge = InferenceModel(reward_model, offload=args.offload_inference_models)
    rollout = make_rollout(
        args.rollout_engine,
        actor,
        model_path=args.pretrain,
        sampling=Sampling(True, 1.0, args.top_k or None, args.top_p, args.repetition_penalty),
        stop_sequences=template.stop_ids,
        max_new_tokens=args.max_seq_len,
        pad_token_id=tokenizer.pad_token_id,
    )
    return assemble_rl(
        settings,
        actor=actor,
        critic=critic,
        reference=rl_models.reference(args, options, actor),
        rollout=rollout,
        scorer=Scorer(judge, functions, args.logits_forward_batch_size),
        tokenizer=tokenizer,
    )


def progress(args: Namespace, resume: Resume, state: RunningState) -> dict[str, Any]:
    """The trainer's arguments about the course of the run: intervals, where it stands, what watches
    it."""
    intervals = args.save_interval, args.keep_last_k, args.eval_interval, args.log_interval
    held = resume.folder and buffer_states_by_rank(resume.folder, resume.state, tp=args.tp)
    return {
        "schedule": RunSchedule(args.save_dir, *intervals, metric_for_best=args.metric_for_best),
        "state": state,
        "buffer_state": held,
        "checks": RLChecks(
            top_k=args.top_k or None,
            top_p=args.top_p,
            repetition_penalty=args.repetition_penalty,
            ptx_coef=args.ptx_coef,
            kl_target=args.kl_target,
            reward_clip=args.reward_clip or None,
            reward_normalization=args.reward_normalization,
            max_new_tokens=args.max_seq_len,
        ),
    }


def loaders(
    args: Namespace,
    actor: Engine,
    tokenizer: Any,
    prompts: Any,
    evaluation: Any,
    ptx: Any,
    epoch_order: EpochOrder,
) -> tuple:
    """The prompts of each episode, batches to evaluate on, and the supervised rows of each step."""
    mesh: dict[str, Any] = {"dp_rank": actor.mesh.dp_rank, "dp_size": actor.mesh.dp_size}
    collate = DataCollatorForPromptDataset(tokenizer, args.max_length - args.max_seq_len)
    batch = args.experience_batch_size
    windows = GlobalBatchLoader(
        prompts,
        collate,
        batch_size=batch,
        accumulation_steps=args.num_collect_steps,
        epoch_order=epoch_order,
        **mesh,
    )
    asked = (
        None
        if evaluation is None
        else EvaluationLoader(evaluation, collate, batch_size=batch, **mesh)
    )
    if ptx is None:
        return windows, asked, None
    supervised = GlobalBatchLoader(
        ptx,
        DataCollatorForSupervisedDataset(
            tokenizer, args.max_length, apply_loss_mask=not args.disable_loss_mask
        ),
        batch_size=args.ptx_batch_size,
        accumulation_steps=args.accumulation_steps,
        seed=args.seed,
        **mesh,
    )
    return windows, asked, supervised
