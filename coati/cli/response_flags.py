"""How responses are sampled and what judges them: flags that compare, sample and evaluate share."""

import argparse
from argparse import Namespace
from dataclasses import dataclass

from coati.cli.decoding_flags import add_decoding_flags
from coati.cli.reward_flags import SlowRewardSettings, check_slow_rewards, names_of_rewards
from coati.cli.values import add_count, add_number, add_text
from coati.rewards.registry import DEFAULT_TIMEOUT, check_rewards


@dataclass(frozen=True)
class ResponseSettings:
    """How responses are drawn."""

    max_length: int
    max_new_tokens: int
    batch_size: int
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    seed: int


@dataclass(frozen=True)
class JudgeSettings:
    """What scores responses."""

    rm_path: str | None
    reward_functions: list[str]
    reward_weights: list[float] | None
    reward_timeout: float
    slow_rewards: SlowRewardSettings

    @property
    def given(self) -> bool:
        """Whether anything does."""
        return bool(self.rm_path or self.reward_functions)


def add_judge_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The group ``judge``: a reward model, reward functions, or both."""
    group = parser.add_argument_group("judge")
    add_text(group, "--rm_path", unit="MODEL", help="reward model: a directory that coati rm wrote")
    group.add_argument(
        "--reward_functions",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"{names_of_rewards()}; added to the score of --rm_path if both are given",
    )
    group.add_argument(
        "--reward_weights",
        nargs="+",
        type=float,
        metavar="W",
        help="one per reward function; default: 1 each",
    )
    add_number(
        group,
        "--reward_timeout",
        default=DEFAULT_TIMEOUT,
        unit="SECONDS",
        exclusive=True,
        help="time limit of a reward function per batch",
    )
    return group


def add_response_flags(
    parser: argparse.ArgumentParser, seed: str, temperature: float | None, otherwise: str = ""
) -> None:
    """The group ``responses``. ``seed``: the help of ``--seed``; ``temperature``: by default, or
    None and in words what it is ``otherwise``."""
    group = parser.add_argument_group("responses")
    add_count(
        group,
        "--max_length",
        default=2048,
        unit="TOKENS",
        least=2,
        help="maximum length of prompt and response together",
    )
    add_count(group, "--max_new_tokens", default=256, unit="TOKENS", help="maximum response length")
    add_count(
        group,
        "--batch_size",
        default=16,
        unit="ROWS",
        help="responses generated or scored at a time",
    )
    add_number(
        group,
        "--temperature",
        default=temperature,
        unit="T",
        help="0: greedy decoding" + (f"; default: {otherwise}" if otherwise else ""),
    )
    add_decoding_flags(group)
    add_count(group, "--seed", default=42, least=0, help=seed)


def check_room(args: Namespace) -> None:
    """Raise ValueError where a response leaves no room for its prompt."""
    if args.max_new_tokens >= args.max_length:
        raise ValueError(
            f"--max_new_tokens {args.max_new_tokens} leaves no room for a prompt in --max_length "
            f"{args.max_length}"
        )


def check_judge(args: Namespace) -> None:
    """Resolve ``reward_functions``. Raise ValueError for what is wrong with a judge."""
    args.reward_functions = check_rewards(args.reward_functions, args.reward_weights)
    if "pairwise_judge" in args.reward_functions:
        raise ValueError(
            "--reward_functions pairwise_judge compares the responses of one model while it is "
            "trained; here each response gets a score by itself: take judge"
        )
    check_slow_rewards(args)
