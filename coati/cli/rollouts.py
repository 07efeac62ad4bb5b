"""The flags of train_ppo.py, train_grpo.py and train_prompts.py."""

import argparse
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

from coati.cli import arguments as shared
from coati.cli import legacy, legacy_ppo
from coati.cli import rollout_flags as flags
from coati.cli.parser import Parser
from coati.cli.rollout_checks import PLACES_OF_KL, check_grpo, check_ppo, check_rollouts
from coati.cli.values import add_count, add_number, add_switch
from coati.experience_maker.advantage_registry import GROUP_METHODS, REWARD_PLACES

# Taken so that they can be refused by name: a model that is cut like this cannot sample.
NOT_HERE = ("--pp", "--sp", "--sp_mode", "--enable_sequence_parallelism", "--microbatch_size")


class RolloutFlags(Namespace):
    """Flags that the code shared with the other trainers knows by other names; they are not written
    to files."""

    @property
    def dataset(self) -> list[str]:
        return self.prompt_dataset

    @property
    def eval_dataset(self) -> list[str]:
        return self.eval_prompt_dataset

    @property
    def batch_size(self) -> int:
        return self.train_batch_size

    @property
    def eval_batch_size(self) -> int:
        return self.experience_batch_size

    @property
    def max_steps(self) -> None:
        """A run ends after ``num_episodes``."""

    @property
    def ref_tp(self) -> None:
        """The reference is split as the policy is."""


def ppo_parser() -> Parser:
    """The parser of ``train_ppo.py``."""
    parser = _parser(
        "train_ppo.py",
        "PPO: the model answers prompts, answers are scored, a critic says what was "
        "expected, and the model learns to do better than that.",
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
        help="logits are divided by it",
    )
    flags.add_sampling_flags(group)
    flags.add_reward_flags(parser, reward_clip=5.0)
    flags.add_kl_flags(parser, kl_coef=0.1, places=("reward",))
    group = flags.add_update_flags(parser)
    add_number(group, "--gamma", default=1.0, unit="G", most=1, help="discount of later rewards")
    add_number(
        group,
        "--lam",
        default=0.95,
        unit="L",
        most=1,
        help="lambda of generalized advantage estimation",
    )
    add_switch(
        group, "--no_whiten_advantages", help="do not bring advantages to mean 0 and spread 1"
    )
    group.add_argument(
        "--reward_at",
        choices=tuple(REWARD_PLACES),
        default="last",
        help=flags.table("where the score is given", REWARD_PLACES),
    )
    flags.add_critic_flags(parser)
    return _finished(parser, lr=9e-6, accumulation_steps=2)


def grpo_parser() -> Parser:
    """The parser of ``train_grpo.py``."""
    parser = _parser(
        "train_grpo.py",
        "GRPO and its kin: several answers to each prompt are scored and compared with "
        "each other, so no critic is needed.",
    )
    group = parser.add_argument_group("algorithm")
    group.add_argument(
        "--algo",
        type=flags.algorithm,
        choices=tuple(GROUP_METHODS),
        default="grpo",
        help=flags.table(
            "how scores become advantages", {name: row.about for name, row in GROUP_METHODS.items()}
        ),
    )
    add_count(
        group,
        "--overlong_buffer_len",
        "--overlong_margin",
        unit="TOKENS",
        least=0,
        help="dapo: the last so many tokens before --max_seq_len cost up to 1 of the score, 0: "
        "none; default: a quarter of --max_seq_len, at most 1024",
    )
    add_switch(
        group,
        "--mask_truncated_completions",
        "--filter_truncated",
        help="responses that --max_seq_len has cut are not trained on",
    )
    flags.add_data_flags(parser)
    group = flags.add_rollout_flags(parser)
    add_count(
        group, "--num_generations", default=8, help="responses to each prompt, which make a group"
    )
    group = parser.add_argument_group("sampling")
    add_number(
        group,
        "--initial_temperature",
        default=1.0,
        unit="T",
        exclusive=True,
        help="logits are divided by it",
    )
    add_number(
        group,
        "--final_temperature",
        default=0.9,
        unit="T",
        exclusive=True,
        help="it moves there in a straight line, from a sixth (at most 100) to half (at most 600) "
        "of the episodes",
    )
    flags.add_sampling_flags(group)
    flags.add_reward_flags(parser, reward_clip=0.0)
    flags.add_kl_flags(parser, kl_coef=0.04, places=tuple(PLACES_OF_KL))
    flags.add_update_flags(parser)
    return _finished(parser, lr=1e-6, accumulation_steps=8)


def _parser(program: str, description: str) -> Parser:
    parser = Parser(
        prog=program,
        description=description,
        usage="%(prog)s --pretrain MODEL --prompt_dataset PATH [PATH ...] "
        "--rm_pretrain MODEL [flags]\n"
        "       %(prog)s --pretrain MODEL --prompt_dataset PATH [PATH ...] --reward_functions "
        "NAME [NAME ...] [flags]",
    )
    shared.add_model_flags(parser)
    return parser


def _finished(parser: Parser, **defaults: Any) -> Parser:
    shared.add_parallel_flags(parser)
    for flag in NOT_HERE:
        parser.action_of(flag).help = argparse.SUPPRESS
    shared.add_optimization_flags(parser)
    add_switch(
        shared.add_lora_flags(parser),
        "--shared_base",
        help="LoRA: actor, critic, reward model and reference are adapters on one copy of "
        "--pretrain",
    )
    shared.add_output_flags(parser, steps="episodes", final="DIR/actor/modeling")
    shared.add_logging_flags(parser, steps="episodes")
    legacy.add_flags(parser)
    legacy_ppo.add_flags(parser)
    parser.set_defaults(**defaults)
    return parser


def parse_ppo(argv: Sequence[str] | None = None) -> Namespace:
    """The checked flags of ``train_ppo.py``; as :func:`coati.cli.arguments.parse_sft`.

    ``kl_estimator``, ``clip_eps_low`` and ``clip_eps_high``, ``inference_batch_size`` and
    ``logits_forward_batch_size`` are settled; 0 means no limit for ``reward_clip``,
    ``reward_timeout`` and
    ``buffer_limit``.
    """
    return _parse(ppo_parser(), argv, check_ppo)


def parse_grpo(argv: Sequence[str] | None = None) -> Namespace:
    """The checked flags of ``train_grpo.py``; as :func:`parse_ppo`, ``overlong_buffer_len`` 0
    without DAPO."""
    return _parse(grpo_parser(), argv, check_grpo)


def parse_prompts(argv: Sequence[str] | None = None) -> Namespace:
    """The checked flags of ``train_prompts.py``: those of ``train_ppo.py`` and of the first
    generation."""
    parser = ppo_parser()
    parser.prog = "train_prompts.py"
    legacy_ppo.add_prompts(parser)
    return _parse(parser, argv, check_ppo)


def _parse(
    parser: Parser, argv: Sequence[str] | None, check: Callable[[Namespace], None]
) -> Namespace:
    args = parser.parse_args(argv, RolloutFlags())
    try:
        legacy_ppo.apply_legacy_flags(args)
        check_rollouts(args)
        check(args)
    except ValueError as error:
        parser.error(str(error))
    return args
