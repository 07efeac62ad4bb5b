"""The flags of coati ppo and coati grpo."""

import argparse
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from coati.cli import arguments as shared
from coati.cli import rollout_flags as flags
from coati.cli.checks import checked, requested_options
from coati.cli.engine_flags import add_engine_flags
from coati.cli.lora_flags import add_lora_flags
from coati.cli.online_settings import (
    OnlineSettings,
    PPOSettings,
    SamplingSettings,
)
from coati.cli.parser import OlderFlags, Parser
from coati.cli.reward_flags import add_reward_flags
from coati.cli.rollout_checks import PLACES_OF_KL, check_grpo, check_ppo, check_rollouts
from coati.cli.settings import (
    DataSettings,
    filled,
    settings_of,
)
from coati.cli.update_flags import add_critic_flags, add_update_flags
from coati.cli.values import add_count, add_number, add_switch, table
from coati.experience_maker.advantage_registry import GROUP_METHODS, REWARD_PLACES

Settings = TypeVar("Settings", bound=OnlineSettings)
# Taken so that they can be refused by name: a model that is split like this cannot sample.
NOT_HERE = ("--pp", "--sp", "--sp_mode", "--enable_sequence_parallelism", "--microbatch_size")


def ppo_parser() -> Parser:
    """The parser of ``coati ppo``."""
    parser = online_parser(
        "coati ppo",
        "PPO: rollouts, rewards, GAE advantages from a critic, clipped policy update.",
    )
    flags.add_data_flags(parser)
    flags.add_rollout_flags(parser)
    group = parser.add_argument_group("sampling")
    add_number(
        group,
        "--temperature",
        default=1.0,
        unit="T",
        exclusive=True,
        help="sampling temperature",
    )
    flags.add_sampling_flags(group)
    add_reward_flags(parser, reward_clip=5.0)
    flags.add_kl_flags(parser, kl_coef=0.1, places=("reward",))
    group = add_update_flags(parser)
    add_number(group, "--gamma", default=1.0, unit="G", most=1, help="discount factor gamma")
    add_number(
        group,
        "--lam",
        default=0.95,
        unit="L",
        most=1,
        help="lambda of generalized advantage estimation (GAE)",
    )
    add_switch(
        group, "--no_whiten_advantages", help="do not whiten advantages to mean 0, deviation 1"
    )
    group.add_argument(
        "--reward_at",
        choices=tuple(REWARD_PLACES),
        default="last",
        help=table("tokens that receive the score", REWARD_PLACES),
    )
    add_critic_flags(parser)
    return add_shared_flags(parser, lr=9e-6, accumulation_steps=2)


def grpo_parser() -> Parser:
    """The parser of ``coati grpo``."""
    parser = online_parser(
        "coati grpo",
        "GRPO and its variants: advantages from a group of responses to each prompt, without a "
        "critic.",
    )
    _add_algorithm_flags(parser)
    flags.add_data_flags(parser)
    group = flags.add_rollout_flags(parser)
    _add_group_flags(group)
    group = parser.add_argument_group("sampling")
    add_number(
        group,
        "--initial_temperature",
        default=1.0,
        unit="T",
        exclusive=True,
        help="sampling temperature at the start",
    )
    add_number(
        group,
        "--final_temperature",
        default=0.9,
        unit="T",
        exclusive=True,
        help="sampling temperature at the end: annealed linearly from a sixth (at most 100) to "
        "half (at most 600) of the episodes",
    )
    flags.add_sampling_flags(group)
    add_reward_flags(parser, reward_clip=0.0)
    flags.add_kl_flags(parser, kl_coef=0.04, places=tuple(PLACES_OF_KL))
    add_update_flags(parser)
    return add_shared_flags(parser, lr=1e-6, accumulation_steps=8)


def _add_algorithm_flags(parser: Parser) -> None:
    group = parser.add_argument_group("algorithm")
    group.add_argument(
        "--algo",
        "--advantage",
        type=flags.algorithm,
        choices=tuple(GROUP_METHODS),
        default="grpo",
        help=table("advantage estimator", {name: row.about for name, row in GROUP_METHODS.items()}),
    )
    add_count(
        group,
        "--overlong_buffer_len",
        "--overlong_margin",
        unit="TOKENS",
        least=0,
        help="DAPO's soft overlong punishment: the last so many tokens before --max_seq_len cost "
        "up to 1 of the score, 0: none; default: a quarter of --max_seq_len, at most 1024, with "
        "--algo dapo",
    )
    add_switch(
        group,
        "--mask_truncated_completions",
        "--filter_truncated",
        help="do not train on responses truncated at --max_seq_len",
    )


def _add_group_flags(group: argparse._ArgumentGroup) -> None:
    """The groups of responses to a prompt."""
    add_count(group, "--num_generations", default=8, help="responses per prompt (the group size)")
    add_switch(
        group,
        "--offline_groups",
        help="train on the responses that the prompts' rows bring with their scores (a list under "
        "responses, completions, ..., and scores), --num_generations of each, and sample none; "
        "functions and reward model are added where they are named",
    )
    add_count(
        group,
        "--dynamic_sampling",
        default=0,
        unit="ROUNDS",
        least=0,
        help="DAPO's dynamic sampling: groups whose scores are all equal are replaced by groups of "
        "further prompts, in up to so many rounds; 0: off",
    )


def online_parser(program: str, description: str) -> Parser:
    """A parser with the flags of the model."""
    parser = Parser(
        prog=program,
        description=description,
        usage="%(prog)s --pretrain MODEL --prompt_dataset PATH [PATH ...] --rm_pretrain MODEL "
        "[flags]\n       %(prog)s --pretrain MODEL --prompt_dataset PATH [PATH ...] "
        "--reward_functions NAME [NAME ...] [flags]",
    )
    shared.add_model_flags(parser)
    return parser


def add_shared_flags(parser: Parser, **defaults: Any) -> Parser:
    """What comes last in all trainers with rollouts; ``defaults`` of theirs."""
    add_engine_flags(parser)
    shared.add_parallel_flags(parser)
    for flag in NOT_HERE:
        parser.action_of(flag).help = argparse.SUPPRESS
    shared.add_optimization_flags(parser)
    add_switch(
        add_lora_flags(parser),
        "--shared_base",
        help="LoRA: actor, critic, reward model and reference are adapters on one shared copy of "
        "--pretrain",
    )
    shared.add_output_flags(parser, steps="episodes", final="DIR/actor/modeling")
    shared.add_logging_flags(parser, steps="episodes")
    parser.set_defaults(**defaults)
    return parser


def parse_ppo(
    argv: Sequence[str] | None = None,
    older: OlderFlags | None = None,
    prog: str | None = None,
) -> PPOSettings:
    """The checked flags of ``coati ppo``; as :func:`coati.cli.arguments.parse_sft`.

    ``kl_estimator``, the clip ranges and the batch sizes of inference are resolved.
    """
    return _parse(PPOSettings, ppo_parser().named(prog), argv, older, check_ppo)


def parse_grpo(
    argv: Sequence[str] | None = None,
    older: OlderFlags | None = None,
    prog: str | None = None,
) -> OnlineSettings:
    """The checked flags of ``coati grpo``; as :func:`parse_ppo`."""
    return _parse(OnlineSettings, grpo_parser().named(prog), argv, older, check_grpo)


def _parse(
    kind: type[Settings],
    parser: Parser,
    argv: Sequence[str] | None,
    older: OlderFlags | None,
    check: Callable[[Namespace], None],
) -> Settings:
    args = checked(parser, argv, check_rollouts, check, older=older)
    options = requested_options(args, args.train_batch_size)
    return settings_of(kind, args, parallel=options, **online_groups(args))


def online_groups(args: Namespace) -> dict[str, Any]:
    """The groups of settings whose fields are not named like the flags."""
    data = filled(
        DataSettings,
        vars(args),
        dataset=args.prompt_dataset,
        eval_dataset=args.eval_prompt_dataset,
    )
    groups: dict[str, Any] = {"data": data}
    if "temperature" in args:  # PPO's stays the same
        groups["sampling"] = filled(
            SamplingSettings,
            vars(args),
            initial_temperature=args.temperature,
            final_temperature=args.temperature,
        )
    return groups
