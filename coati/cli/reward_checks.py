"""Checks of the flags of rewards before torch is imported: where scores come from, and which
responses evaluations count as right. All raise ValueError with flag, finding and remedy."""

from argparse import Namespace
from pathlib import Path

from coati.cli.reward_flags import check_slow_rewards, names_of_rewards, reward_names
from coati.models.loading import find_model, is_bare
from coati.parallel.plugin_checks import scalar_head_problem
from coati.rewards.registry import REWARDS, check_rewards


def check_reward_sources(args: Namespace) -> None:
    """A reward model, functions, or both; and where the reward model is."""
    neural = bool(args.rm_pretrain or args.rm_checkpoint_path) and not args.no_neural_reward_model
    if args.no_neural_reward_model and args.rm_checkpoint_path:
        raise ValueError(
            f"--rm_checkpoint_path {args.rm_checkpoint_path} brings a reward model, "
            "--no_neural_reward_model says that "
            "there is none; leave one of the two out"
        )
    functions = [*args.reward_functions, *args.source_rewards]
    if getattr(args, "offline_groups", False):
        functions.append("the scores of the rows")
    if args.no_neural_reward_model and not functions and not args.environment:
        raise ValueError(f"--no_neural_reward_model needs --reward_functions: {names_of_rewards()}")
    if not neural and not functions and not args.environment:
        raise ValueError(
            "nothing gives a reward: name a reward model (--rm_pretrain, the directory that "
            "coati rm wrote), or "
            f"--reward_functions ({names_of_rewards()}), or both, or an --environment"
        )
    if (
        args.no_neural_reward_model
        and args.rm_pretrain
        and getattr(args, "critic_pretrain", args.rm_pretrain)
    ):
        raise ValueError(
            "--rm_pretrain does nothing with --no_neural_reward_model here; leave one of the two "
            "out"
        )
    if args.rm_checkpoint_path is not None:
        check_weights(args, "rm_checkpoint_path")
    wrong = "models with a scalar head, as reward models are,"
    problem = scalar_head_problem(args.plugin, args.tp, args.zero_stage, wrong)
    if neural and problem:
        raise ValueError(problem)


def check_weights(args: Namespace, flag: str, *names: str) -> None:
    path = Path(getattr(args, flag))
    if path.is_file():
        raise ValueError(
            f"--{flag} {path} is a file; expected the directory that a training script wrote"
        )
    if not path.is_dir():
        raise ValueError(f"--{flag} {path}: there is no such directory")
    try:
        place = find_model(path, *names)
    except ValueError as error:
        raise ValueError(f"--{flag} {error}") from error
    if is_bare(place) and args.rm_pretrain is None:
        raise ValueError(
            f"--{flag} {path} holds weights without a configuration: name their architecture with "
            "--rm_pretrain"
        )


def check_scores(args: Namespace) -> None:
    if args.reward_weights and not args.reward_functions:
        raise ValueError("--reward_weights does nothing without --reward_functions")
    args.reward_functions = check_rewards(args.reward_functions, args.reward_weights or None)
    check_slow_rewards(args)
    _check_pairwise_judge(args)
    if args.reward_functions and not any(args.reward_weights or [1.0]):
        raise ValueError(
            f"--reward_weights {' '.join(map(str, args.reward_weights))}: no function would count"
        )


def _check_pairwise_judge(args: Namespace) -> None:
    """It compares several responses to a prompt."""
    if "pairwise_judge" not in reward_names(args):
        return
    generations = getattr(args, "num_generations", 1)
    if generations < 2:
        raise ValueError(
            "--reward_functions pairwise_judge compares the responses to a prompt, of which there "
            "is one here; take judge, which scores a response by itself, or coati grpo or "
            "online-dpo with --num_generations 2 or more"
        )
    if args.eval_prompt_dataset or args.eval_ratio:
        flag = "--eval_prompt_dataset" if args.eval_prompt_dataset else "--eval_ratio"
        raise ValueError(
            f"{flag}: pairwise_judge compares responses of one model, whose mean share of wins is "
            "0.5 whatever the model has learned; leave it out, and compare the models afterward: "
            "coati compare"
        )


def check_pass_at(args: Namespace) -> None:
    """pass@k of evaluations."""
    for name in ("eval_generations", "eval_right"):
        if getattr(args, name) is not None and not args.eval_pass_at:
            raise ValueError(f"--{name} does nothing without --eval_pass_at")
    if not args.eval_pass_at:
        return
    if not (args.eval_prompt_dataset or args.eval_ratio):
        raise ValueError(
            "--eval_pass_at is estimated on evaluation prompts: name them in "
            "--eval_prompt_dataset, or hold some out with --eval_ratio"
        )
    most = max(args.eval_pass_at)
    if args.eval_generations is not None and args.eval_generations < most:
        raise ValueError(
            f"--eval_pass_at {most} takes {most} responses or more to a prompt, --eval_generations "
            f"is {args.eval_generations}"
        )
    telling = [name for name, row in REWARDS.items() if row.right is not None]
    if args.eval_right is None and not set(telling) & set(reward_names(args)):
        raise ValueError(
            "--eval_pass_at: none of the rewards says by itself which responses are right, as "
            f"{', '.join(telling)} do; name the reward that a right one reaches in --eval_right"
        )
