"""Checks of the flags of PPO, GRPO and online DPO before torch is imported. All raise ValueError
with flag, finding and remedy."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from coati.cli.checks import (
    check_evaluation,
    check_mixture,
    check_optimizer,
    check_parallel,
    check_paths,
    check_schedule,
    read_json,
    requested_options,
)
from coati.cli.engine_flags import check_engine
from coati.cli.launch_flags import check_launch, processes_of
from coati.cli.lora_flags import check_lora
from coati.cli.reward_checks import (
    check_pass_at,
    check_reward_sources,
    check_scores,
    check_weights,
)
from coati.cli.row_flags import check_columns
from coati.cli.update_flags import check_policy_loss
from coati.environments.environment_table import check_environment, environment_arguments
from coati.experience_buffer.batch_sizes import optimizer_steps_per_pass
from coati.experience_maker.advantage_registry import GROUP_METHODS
from coati.parallel.plugin_checks import scalar_head_problem
from coati.parallel.plugins import PLUGINS
from coati.utils.logging import get_logger

logger = get_logger(__name__)

KL_HORIZON = 10000
# --kl_in -> what it means, and the estimator that suits it
PLACES_OF_KL = {
    "loss": "added to the loss of each token",
    "reward": "taken off the reward",
}
ESTIMATOR_OF = {"loss": "k3", "reward": "k1"}
LONGEST_BUFFER = 1024
MAX_TURNS = 8
# Plugins whose weights one process holds whole, so that several models can share them.
SHARING = tuple(name for name, row in PLUGINS.items() if row.whole_weights)
# A sampled token's log-prob is of the whole distribution, whatever these made of it.
CHANGES_SAMPLES = {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}


def _check_added_tokens(args: Namespace) -> None:
    """A policy samples a token only after it has learned it."""
    if args.add_tokens:
        raise ValueError(
            "--add_tokens: new tokens have to be learned before they are sampled; add them in "
            "coati sft, then name its result in --pretrain"
        )


def check_rollouts(args: Namespace) -> None:
    """What PPO and GRPO share; resolves ``lora_rank``, the batch sizes of inference, and the names
    of rewards."""
    check_online(args, _check_buffer, _check_kl, _check_correction)


def check_online(args: Namespace, *own: Callable[[Namespace], None]) -> None:
    """What all trainers with rollouts share, and checks of their ``own``."""
    if not args.pretrain:
        raise ValueError(
            "--pretrain is missing: the Hugging Face directory or hub name of the model to train"
        )
    if not args.prompt_dataset:
        raise ValueError(
            "--prompt_dataset is missing: prepared arrow directories (coati prepare --type "
            "prompt) or a raw file"
        )
    check_paths(args, ("prompt_dataset", "eval_prompt_dataset", "ptx_dataset"))
    check_columns(args)
    check_mixture(args, args.prompt_dataset)
    check_lora(args)
    _check_added_tokens(args)
    _check_can_sample(args)
    check_launch(args)
    options = requested_options(args, args.train_batch_size)
    check_parallel(args.plugin, options, processes_of(args))
    check_optimizer(args, options)
    _check_lengths(args)
    _check_ptx(args)
    _check_environment(args)
    check_reward_sources(args)
    check_scores(args)
    for check in own:
        check(args)
    check_pass_at(args)
    _check_pointless(args)
    _check_machine(args)


def _check_can_sample(args: Namespace) -> None:
    """A model that is split into pipeline stages or along the sequence cannot sample."""
    for flag, given in (
        (f"--pp {args.pp}", args.pp > 1),
        (f"--sp {args.sp}", args.sp > 1),
        ("--enable_sequence_parallelism", args.enable_sequence_parallelism),
    ):
        if given:
            raise ValueError(
                f"{flag}: the model has to write responses, which one that is split into pipeline "
                "stages or along the sequence cannot; use --plugin 3d --tp, or --plugin zero2 or "
                "gemini"
            )


def _check_lengths(args: Namespace) -> None:
    room = args.max_length - args.max_seq_len
    if room < 1:
        raise ValueError(
            f"--max_length {args.max_length} holds prompt and response; --max_seq_len "
            f"{args.max_seq_len} for the "
            f"response leaves {room} tokens for the prompt. Raise --max_length or lower "
            "--max_seq_len"
        )


def _check_environment(args: Namespace) -> None:
    """Resolves ``max_turns``."""
    if args.environment is None:
        for name in ("environment_args", "max_turns"):
            if getattr(args, name) is not None:
                raise ValueError(
                    f"--{name} does nothing without --environment; name one, or leave it out"
                )
        return
    check_environment(args.environment)
    environment_arguments(args.environment, args.environment_args)
    args.max_turns = args.max_turns or MAX_TURNS
    for path in [*args.prompt_dataset, *args.eval_prompt_dataset]:
        if (Path(path) / "preparation.json").exists():
            raise ValueError(
                f"--environment: {path} is prepared, and prepared prompts hold no messages for an "
                "environment to begin with; name the raw file that it was made of"
            )


def _check_ptx(args: Namespace) -> None:
    if args.ptx_coef and not args.ptx_dataset:
        raise ValueError(
            f"--ptx_coef {args.ptx_coef:g} needs --ptx_dataset, the conversations to learn beside "
            "it"
        )
    if args.ptx_dataset and not args.ptx_coef:
        logger.warning_once(
            "--ptx_dataset is not used, --ptx_coef being 0; --ptx_coef 0.1 would give SFT a tenth "
            "of the loss"
        )
    if args.ptx_coef and args.plugin and not PLUGINS[args.plugin].accumulation:
        raise ValueError(
            f"--plugin {args.plugin} cannot add up gradients, and --ptx_coef makes two backward "
            "passes of a step; use "
            "--plugin gemini"
        )
    if args.disable_loss_mask and not args.ptx_coef:
        raise ValueError(
            "--disable_loss_mask is about SFT on --ptx_dataset: set --ptx_coef above 0, or leave "
            "it out"
        )


def check_ids(written: int, read: int) -> None:
    """Any of the ``written`` rows of the policy's vocabulary can be sampled, those without a token
    too; the other models know ``read``."""
    if read < written:
        raise ValueError(
            f"the policy (--pretrain) can write ids up to {written - 1}, this model has a "
            f"vocabulary of {read}; train "
            "it from a model of the policy's vocabulary, or resize its embeddings"
        )


def _check_offline_groups(args: Namespace) -> None:
    """Groups that the rows bring."""
    if not args.offline_groups:
        return
    what = "--offline_groups: responses are those of the rows, none are sampled"
    if args.environment:
        raise ValueError(f"{what}; an environment would have nobody to answer, leave it out")
    if args.rollouts_ahead:
        raise ValueError(f"{what}; leave --rollouts_ahead {args.rollouts_ahead} out")
    for path in [*args.prompt_dataset]:
        if (Path(path) / "preparation.json").exists():
            raise ValueError(
                f"--offline_groups: {path} is prepared, and prepared prompts hold no responses; "
                "name the raw file that it was made of"
            )


def _check_dynamic_sampling(args: Namespace) -> None:
    if not args.dynamic_sampling:
        return
    what = f"--dynamic_sampling {args.dynamic_sampling}"
    if not GROUP_METHODS[args.algo].group:
        raise ValueError(
            f"{what} replaces groups of equal scores, and --algo {args.algo} compares no groups; "
            "leave one of the two out"
        )
    if args.rollouts_ahead:
        raise ValueError(
            f"{what}: how many prompts an episode takes is known only when it has been judged, so "
            f"none can be asked for ahead; leave --rollouts_ahead {args.rollouts_ahead} out"
        )
    if args.reward_normalization != "none":
        raise ValueError(
            f"{what}: the running mean of scores would be of the groups that were replaced too; "
            "leave --reward_normalization out"
        )


def _check_group(args: Namespace) -> None:
    if GROUP_METHODS[args.algo].group and args.num_generations == 1:
        raise ValueError(
            f"--num_generations 1: --algo {args.algo} compares the responses to a prompt, which "
            "takes two or more; 8 "
            "is usual. reinforce_pp does without a comparison"
        )


def _check_buffer(args: Namespace) -> None:
    """The buffer equation, and the batch sizes of inference."""
    if "algo" in args:
        _check_group(args)
    generations = getattr(args, "num_generations", 1)
    optimizer_steps_per_pass(
        args.num_collect_steps,
        args.experience_batch_size,
        args.train_batch_size,
        args.accumulation_steps,
        generations,
    )
    window = args.train_batch_size * args.accumulation_steps
    collected = args.num_collect_steps * args.experience_batch_size * generations
    if args.buffer_limit and (args.buffer_limit % window or args.buffer_limit > collected):
        raise ValueError(
            f"--buffer_limit {args.buffer_limit}: an episode collects {collected} responses per "
            "process and an "
            f"optimizer step takes {window} (--train_batch_size x --accumulation_steps); keep a "
            f"multiple of {window} "
            f"that is at most {collected}, or 0 for all"
        )
    args.inference_batch_size = (
        args.inference_batch_size or args.experience_batch_size * generations
    )
    args.logits_forward_batch_size = args.logits_forward_batch_size or args.train_batch_size


def _check_kl(args: Namespace) -> None:
    args.kl_estimator = args.kl_estimator or ESTIMATOR_OF[args.kl_in]
    if args.kl_target is None:
        if args.kl_horizon != KL_HORIZON:
            raise ValueError(
                "--kl_horizon does nothing without --kl_target: --kl_coef stays as it is"
            )
    else:
        _check_target(args)
    if not args.kl_coef:
        return
    changed = [
        f"--{name} {getattr(args, name)}"
        for name, off in CHANGES_SAMPLES.items()
        if getattr(args, name) != off
    ]
    if changed:
        logger.warning_once(
            f"{', '.join(changed)}: responses are sampled from another distribution than log-probs "
            "are taken of, so KL "
            "estimates come out wrong, below 0 too"
        )


def _check_target(args: Namespace) -> None:
    if not args.kl_coef:
        raise ValueError(
            "--kl_target multiplies --kl_coef toward it, which is 0: set --kl_coef above 0, 0.1 say"
        )
    processes = max(processes_of(args) // args.tp, 1)
    each = args.num_collect_steps * args.experience_batch_size * getattr(args, "num_generations", 1)
    if 0.2 * each * processes >= args.kl_horizon:
        raise ValueError(
            f"--kl_horizon {args.kl_horizon} is too short: an episode collects {each * processes} "
            "responses and could "
            f"make --kl_coef 0 at once; take {20 * each * processes} or more"
        )


def _check_correction(args: Namespace) -> None:
    """The importance weights of responses of older weights."""
    mask = args.rollout_is_mask
    if args.rollout_is_cap is not None and args.rollout_is_cap < 1:
        raise ValueError(
            f"--rollout_is_cap {args.rollout_is_cap:g}: weights are 1 on average; give 1 or more, "
            "2 is usual"
        )
    if mask is not None and not mask[0] < 1 < mask[1]:
        raise ValueError(
            f"--rollout_is_mask {mask[0]:g} {mask[1]:g}: expected LOW below 1 and HIGH above 1, "
            "around the ratio of weights that have not moved; 0.5 5 is usual"
        )
    given = {"cap": args.rollout_is_cap, "mask": mask}
    for name in [name for name, value in given.items() if value is not None]:
        if args.rollout_is == "none":
            raise ValueError(
                f"--rollout_is_{name} does nothing with --rollout_is none; leave one of the two out"
            )
        if not args.rollouts_ahead:
            logger.warning_once(
                f"--rollout_is_{name} has no effect: without --rollouts_ahead responses are of the "
                "weights that the update begins with"
            )


def _check_pointless(args: Namespace) -> None:
    """A flag that would have no effect is a mistake somewhere else."""
    flags = ("eval_interval", "metric_for_best")
    check_evaluation(args, "prompt_dataset", "eval_prompt_dataset", flags)
    check_schedule(args)
    if args.eval_interval is None and (args.eval_prompt_dataset or args.eval_ratio):
        args.eval_interval = max(args.num_episodes // 10, 1)


def _check_machine(args: Namespace) -> None:
    check_engine(args)
    if not args.shared_base:
        return
    if not args.lora_rank:
        raise ValueError(
            "--shared_base is for LoRA, whose models differ in their adapters alone: set "
            "--lora_rank"
        )
    if (
        args.plugin not in (None, *SHARING)
        or args.tp > 1
        or args.zero_stage
        or args.zero_cpu_offload
    ):
        raise ValueError(
            f"--shared_base needs a plugin that leaves weights whole ({', '.join(SHARING)}), "
            "without --tp and "
            "--zero_stage; a base that ColossalAI cuts cannot be shared"
        )
    if _trained_biases(args) != "none":
        raise ValueError(
            "--shared_base: LoRA may not train biases, which belong to the base that all share; "
            "set "
            "--lora_train_bias none"
        )
    if args.offload_inference_models:
        raise ValueError(
            "--offload_inference_models does nothing with --shared_base: the one base is never idle"
        )
    if getattr(args, "critic_pretrain", None):
        raise ValueError(
            "--critic_pretrain with --shared_base: the critic is an adapter on --pretrain; leave "
            "one out"
        )


def _trained_biases(args: Namespace) -> str:
    held = read_json("lora_config", args.lora_config) if args.lora_config else {}
    return args.lora_train_bias or held.get("lora_train_bias", "none")


def check_ppo(args: Namespace) -> None:
    """PPO's own flags; resolves the clip ranges."""
    check_policy_loss(args)
    if args.critic_pretrain and args.critic_checkpoint_path:
        raise ValueError(
            f"--critic_pretrain {args.critic_pretrain} and --critic_checkpoint_path "
            f"{args.critic_checkpoint_path} both "
            "bring the critic's weights; name one of them"
        )
    if args.critic_checkpoint_path is not None:
        check_weights(args, "critic_checkpoint_path", "critic")
    wrong = "the gradients of a critic's head"
    if problem := scalar_head_problem(args.plugin, args.tp, args.zero_stage, wrong):
        raise ValueError(problem)


def check_grpo(args: Namespace) -> None:
    """GRPO's own flags; resolves the clip ranges and DAPO's overlong buffer."""
    check_policy_loss(args)
    _check_dynamic_sampling(args)
    _check_offline_groups(args)
    if args.overlong_buffer_len and args.algo != "dapo":
        raise ValueError(f"--overlong_buffer_len belongs to --algo dapo, not {args.algo}")
    if args.overlong_buffer_len is None:
        usual = min(LONGEST_BUFFER, args.max_seq_len // 4)
        args.overlong_buffer_len = usual if args.algo == "dapo" else 0
    if args.overlong_buffer_len > args.max_seq_len:
        raise ValueError(
            f"--overlong_buffer_len {args.overlong_buffer_len} is more than a response may have "
            f"(--max_seq_len {args.max_seq_len}); a quarter of it is usual"
        )
    if args.overlong_buffer_len and args.mask_truncated_completions:
        logger.warning_once(
            "--mask_truncated_completions leaves out the responses that --overlong_buffer_len "
            "punishes most"
        )
