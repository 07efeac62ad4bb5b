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
from coati.experience_buffer.batch_sizes import windows_per_episode
from coati.experience_buffer.buffer import NaiveExperienceBuffer
from coati.experience_maker.advantage_registry import GROUP_METHODS
from coati.experience_maker.maker import NaiveExperienceMaker
from coati.experience_maker.rollout import make_rollout
from coati.experience_maker.rollout_batch import ExperienceSettings
from coati.experience_maker.running_moments import KLController
from coati.experience_maker.scoring import Scorer
from coati.models.generation.loop import Sampling
from coati.models.policy_loss import Normalization
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
from coati.trainer.rl import annealing
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
    window = args.train_batch_size * args.accumulation_steps
    windows = args.buffer_limit // window or windows_per_episode(
        args.num_collect_steps,
        args.experience_batch_size,
        args.train_batch_size,
        args.accumulation_steps,
        getattr(args, "num_generations", 1),
    )
    return Episodes(
        args.num_episodes,
        args.num_update_steps,
        windows,
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
    return annealing(args.initial_temperature, args.final_temperature, start, end)


def maker(
    args: Namespace,
    options: ParallelOptions,
    tokenizer: Any,
    template: Conversation,
    actor: Engine,
    functions: Rewards | None,
    critic: Engine | None = None,
) -> NaiveExperienceMaker:
    """What collects experience, with reward model and reference loaded."""
    scoring, method = rl_models.reward_engine(args, options, tokenizer), getattr(args, "algo", None)
    settings = ExperienceSettings(
        max_new_tokens=args.max_seq_len,
        stop_sequences=template.stop_ids,
        method=method,
        num_generations=getattr(args, "num_generations", 1),
        kl_estimator=args.kl_estimator,
        kl_in=args.kl_in,
        gamma=getattr(args, "gamma", 1.0),
        lam=getattr(args, "lam", 0.95),
        reward_clip=args.reward_clip or None,
        reward_at=getattr(args, "reward_at", "last"),
        reward_normalization=args.reward_normalization,
        missing_eos_penalty=args.missing_eos_penalty,
        overlong_margin=getattr(args, "overlong_margin", 0) or None,
        filter_truncated=getattr(args, "filter_truncated", False),
        whiten=not getattr(args, "no_whiten_advantages", False),
        rollout_batch_size=args.inference_batch_size,
        forward_batch_size=args.logits_forward_batch_size,
        seed=args.seed,
    )
    rollout = make_rollout(
        args.rollout_engine,
        actor,
        model_path=args.pretrain,
        sampling=Sampling(True, 1.0, args.top_k or None, args.top_p, args.repetition_penalty),
        stop_sequences=template.stop_ids,
        max_new_tokens=args.max_seq_len,
        pad_token_id=tokenizer.pad_token_id,
    )
    return NaiveExperienceMaker(
        actor,
        rollout,
        Scorer(
            None
            if scoring is None
            else InferenceModel(scoring, offload=args.offload_inference_models),
            functions,
            args.logits_forward_batch_size,
        ),
        tokenizer,
        settings,
        reference=rl_models.reference(args, options, actor),
        critic=critic,
        kl=KLController(args.kl_coef, args.kl_target, args.kl_horizon),
    )


def policy(args: Namespace) -> PolicySettings:
    """The policy's loss."""
    name = GROUP_METHODS[args.algo].normalization if "algo" in args else "token"
    return PolicySettings(
        args.clip_eps_low,
        args.clip_eps_high,
        args.skip_threshold,
        Normalization(name, args.max_seq_len),
        args.kl_coef if args.kl_in == "loss" else 0.0,
        args.kl_estimator,
    )


def parts(args: Namespace, resume: Resume, state: RunningState) -> dict[str, Any]:
    """Keywords of the trainers that need no model."""
    intervals = args.save_interval, args.keep_last_k, args.eval_interval, args.log_interval
    return {
        "policy": policy(args),
        "ptx_coef": args.ptx_coef,
        "schedule": RunSchedule(args.save_dir, *intervals, metric_for_best=args.metric_for_best),
        "state": state,
        "held": None
        if resume.folder is None
        else buffer_states_by_rank(resume.folder, resume.state, tp=args.tp),
        "signs": RLChecks(
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


def buffer(args: Namespace) -> NaiveExperienceBuffer:
    """What holds the responses of an episode."""
    return NaiveExperienceBuffer(args.train_batch_size, args.buffer_limit)


def loaders(
    args: Namespace,
    actor: Engine,
    tokenizer: Any,
    prompts: Any,
    evaluation: Any,
    ptx: Any,
    plan: EpochOrder,
) -> tuple:
    """A window of prompts for each episode, batches to evaluate on, and a window of supervised rows
    for each step."""
    mesh = {"dp_rank": actor.mesh.dp_rank, "dp_size": actor.mesh.dp_size}
    collate = DataCollatorForPromptDataset(tokenizer, args.max_length - args.max_seq_len)
    batch = args.experience_batch_size
    windows = GlobalBatchLoader(
        prompts,
        collate,
        batch_size=batch,
        accumulation_steps=args.num_collect_steps,
        plan=plan,
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
