"""Flags of rewards: what scores responses, and those that take their time: endpoints, a judge, and
tests of programs."""

import argparse
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from coati.cli.values import add_count, add_number, add_switch, add_text, number
from coati.experience_maker.advantage_registry import REWARD_NORMALIZATIONS
from coati.rewards.registry import DEFAULT_CONCURRENCY, DEFAULT_TIMEOUT, REWARDS
from coati.rewards.reward_options import JUDGES, JudgeOptions, PairJudgeOptions, RewardOptions
from coati.rewards.source_sets import parse_source_rewards
from coati.utils.ray_cluster import AUTO

Judging = TypeVar("Judging", bound=JudgeOptions)
# flag -> default. Those that do something for one reward alone.
OF_JUDGE = ("judge_url", "judge_model", "judge_prompt", "judge_pattern", "judge_failed")
OF_TESTS = {"test_timeout": RewardOptions.test_timeout, "test_memory": RewardOptions.test_memory}


@dataclass(frozen=True)
class SlowRewardSettings:
    """Rewards that take their time. ``judge_url`` None: there is no judge; ``judge_prompt`` and
    ``judge_pattern`` None: those of the library."""

    reward_concurrency: int = DEFAULT_CONCURRENCY
    judge_url: str | None = None
    judge_model: str | None = None
    judge_prompt: str | None = None
    judge_pattern: str | None = None
    judge_failed: float | None = None
    test_timeout: float = RewardOptions.test_timeout
    test_memory: int = RewardOptions.test_memory
    rewards_on_ray: bool = False
    ray_address: str = AUTO

    def options(self, names: Sequence[str] = ()) -> RewardOptions:
        """As :class:`~coati.rewards.scorer.Rewards` takes them with the functions ``names``, which
        say whether the judge judges pairs."""
        judge = pairs = None
        if self.judge_url is not None and "pairwise_judge" in names:
            pairs = self._judge(PairJudgeOptions)
        elif self.judge_url is not None:
            judge = self._judge(JudgeOptions)
        return RewardOptions(
            self.reward_concurrency,
            judge,
            pairs,
            self.test_timeout,
            self.test_memory,
            self.ray_address if self.rewards_on_ray else None,
        )

    def _judge(self, kind: type[Judging]) -> Judging:
        given: dict[str, Any] = {}
        if self.judge_prompt is not None:
            given["prompt"] = read_prompt(self.judge_prompt)
        if self.judge_pattern:
            given["pattern"] = self.judge_pattern
        url = self.judge_url or ""
        return kind(url, self.judge_model or "", failed=self.judge_failed, **given)


def names_of_rewards() -> str:
    """What ``--reward_functions`` takes, for its help."""
    return f"{', '.join(REWARDS)}, path.py:function of your own, or the URL of an endpoint"


def add_reward_flags(parser: argparse.ArgumentParser, reward_clip: float | None) -> None:
    """``reward_clip`` None: scores are compared alone, and neither clipped nor normalized."""
    group = parser.add_argument_group(
        "reward", "A reward model, reward functions, or the sum of both."
    )
    add_text(
        group,
        "--rm_pretrain",
        unit="MODEL",
        help="reward model of coati rm; with --rm_checkpoint_path: its architecture only",
    )
    add_text(
        group,
        "--rm_checkpoint_path",
        help="directory with the weights and head of the reward model",
    )
    add_switch(
        group,
        "--no_neural_reward_model",
        help="reward functions only; --rm_pretrain then initializes the critic",
    )
    group.add_argument(
        "--reward_functions",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"{names_of_rewards()}, which is given all responses of a batch",
    )
    group.add_argument(
        "--reward_weights",
        nargs="+",
        type=_weight,
        default=[],
        metavar="W",
        help="weight of each reward function, possibly negative; default: 1 each",
    )
    group.add_argument(
        "--source_rewards",
        nargs="+",
        default=[],
        metavar="SOURCE=NAME",
        help="reward functions by where a row comes from, its column source (or data_source, or "
        "category): math=math_competition,format@0.1 code=python_tests, @ before a weight; "
        "*=NAME for all other rows. They are added to --reward_functions, which score every row",
    )
    _add_score_flags(group, reward_clip)
    add_slow_reward_flags(parser)


def _add_score_flags(group: argparse._ArgumentGroup, reward_clip: float | None) -> None:
    """What is made of scores."""
    add_number(
        group,
        "--reward_timeout",
        default=DEFAULT_TIMEOUT,
        unit="SECONDS",
        help="time limit of a reward function for a batch, of a function of one response that is "
        "async for each, and of a request with all its retries; 0: none",
    )
    if reward_clip is not None:
        add_number(
            group,
            "--reward_clip",
            default=reward_clip,
            unit="R",
            help="clip scores to -R .. R; 0: no clipping",
        )
        group.add_argument(
            "--reward_normalization",
            choices=REWARD_NORMALIZATIONS,
            default="none",
            help="running: normalize scores by the running mean and deviation",
        )
    add_number(
        group,
        "--missing_eos_penalty",
        default=0.0,
        unit="P",
        help="subtracted from the score of a response without end token",
    )


def _weight(text: str) -> float:
    try:
        return number(float("-inf"))(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected a number, found {text!r}") from None


def add_slow_reward_flags(parser: argparse.ArgumentParser) -> None:
    """The group of :class:`SlowRewardSettings`."""
    group = parser.add_argument_group(
        "rewards that take their time",
        "Endpoints and async functions, the reward judge, and the reward python_tests.",
    )
    add_count(
        group,
        "--reward_concurrency",
        default=DEFAULT_CONCURRENCY,
        help="responses that the judge, or an async function of one response, is asked about at "
        "a time by each process",
    )
    add_text(
        group,
        "--judge_url",
        unit="URL",
        help="OpenAI-compatible server of the reward judge, such as http://127.0.0.1:7070/v1; its "
        "key is read from the environment variable COATI_JUDGE_KEY",
    )
    add_text(group, "--judge_model", unit="NAME", help="model of --judge_url")
    add_text(
        group,
        "--judge_prompt",
        unit="FILE",
        help="what the judge is asked: a text with {prompt}, {response} and {gt_answer} in it, of "
        "pairwise_judge with {response_a} and {response_b}; default: to rate the response from 1 "
        "to 10, or which of two is better",
    )
    add_text(
        group,
        "--judge_pattern",
        unit="REGEX",
        help="the first group of its last match in the verdict is the score, of pairwise_judge A, "
        'B or anything else for a tie; default: what stands after "Score:" or "Better:"',
    )
    group.add_argument(
        "--judge_failed",
        type=number(float("-inf")),
        metavar="SCORE",
        help="score of a response that got no verdict with a score in three tries, of "
        "pairwise_judge 0.5 for a tie; default: the run ends",
    )
    add_number(
        group,
        "--test_timeout",
        default=RewardOptions.test_timeout,
        unit="SECONDS",
        exclusive=True,
        help="python_tests: time limit of each test",
    )
    add_count(
        group,
        "--test_memory",
        default=RewardOptions.test_memory,
        unit="MIB",
        least=64,
        help="python_tests: memory limit of a program",
    )


def reward_names(args: Namespace) -> list[str]:
    """The functions that score some row, aliases resolved. Raises ValueError for ``source_rewards``
    that are none."""
    sources = getattr(args, "source_rewards", [])
    by_source = parse_source_rewards(sources) if sources else {}
    return [*args.reward_functions, *(n for found in by_source.values() for n in found.names)]


def check_slow_rewards(args: Namespace) -> None:
    """The flags of :class:`SlowRewardSettings`, once ``reward_functions`` are resolved. Raises
    ValueError for what is wrong, missing, or would do nothing."""
    given = [flag for flag in OF_JUDGE if getattr(args, flag) is not None]
    names = reward_names(args)
    judges = [name for name in JUDGES if name in names]
    if not judges and given:
        raise ValueError(f"--{given[0]} does nothing without --reward_functions judge")
    if len(judges) > 1:
        raise ValueError(
            f"--reward_functions {' '.join(judges)}: --judge_prompt and the other flags are of one "
            "judge; name one of the two"
        )
    if judges:
        _check_judge(args, judges[0])
    for flag, default in OF_TESTS.items():
        if getattr(args, flag) != default and "python_tests" not in names:
            raise ValueError(f"--{flag} does nothing without --reward_functions python_tests")


def _check_judge(args: Namespace, name: str) -> None:
    for flag in OF_JUDGE[:2]:
        if not getattr(args, flag):
            raise ValueError(
                f"--{flag} is missing: --reward_functions {name} asks a model of an "
                "OpenAI-compatible server (--judge_url http://host/v1 --judge_model NAME)"
            )
    failed = args.judge_failed
    if name == "pairwise_judge" and failed is not None and not 0 <= failed <= 1:
        raise ValueError(
            f"--judge_failed {failed:g}: with pairwise_judge it is the share of a comparison that "
            "a response wins, 0 to 1; 0.5 is a tie"
        )
    settings = {flag: getattr(args, flag) for flag in OF_JUDGE}
    SlowRewardSettings(**settings).options([name])


def read_prompt(path: str) -> str:
    """The text of ``--judge_prompt``. Raises ValueError naming the file."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--judge_prompt {path} is no UTF-8 text: {error}") from error
    except OSError as error:
        raise ValueError(f"--judge_prompt {path} cannot be read: {error.strerror}") from error
    if not text.strip():
        raise ValueError(f"--judge_prompt {path} is empty")
    return text
