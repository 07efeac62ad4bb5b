"""Flags of rewards that take their time: endpoints, a judge, and tests of programs."""

import argparse
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from coati.cli.values import add_count, add_number, add_text, number
from coati.rewards.registry import DEFAULT_CONCURRENCY, REWARDS
from coati.rewards.reward_options import JUDGE_PATTERN, JUDGE_PROMPT, JudgeOptions, RewardOptions

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

    def options(self) -> RewardOptions:
        """As :class:`~coati.rewards.scorer.Rewards` takes them."""
        judge = None
        if self.judge_url is not None:
            judge = JudgeOptions(
                self.judge_url,
                self.judge_model or "",
                JUDGE_PROMPT if self.judge_prompt is None else read_prompt(self.judge_prompt),
                self.judge_pattern or JUDGE_PATTERN,
                self.judge_failed,
            )
        return RewardOptions(self.reward_concurrency, judge, self.test_timeout, self.test_memory)


def names_of_rewards() -> str:
    """What ``--reward_functions`` takes, for its help."""
    return f"{', '.join(REWARDS)}, path.py:function of your own, or the URL of an endpoint"


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
        help="what the judge is asked: a text with {prompt}, {response} and {gt_answer} in it; "
        "default: to rate the response from 1 to 10",
    )
    add_text(
        group,
        "--judge_pattern",
        unit="REGEX",
        help="the first group of its last match in the verdict is the score; default: the number "
        'after "Score:"',
    )
    group.add_argument(
        "--judge_failed",
        type=number(float("-inf")),
        metavar="SCORE",
        help="score of a response that got no verdict with a score in three tries; default: the "
        "run ends",
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


def check_slow_rewards(args: Namespace) -> None:
    """The flags of :class:`SlowRewardSettings`, once ``reward_functions`` are resolved. Raises
    ValueError for what is wrong, missing, or would do nothing."""
    given = [flag for flag in OF_JUDGE if getattr(args, flag) is not None]
    if "judge" not in args.reward_functions and given:
        raise ValueError(f"--{given[0]} does nothing without --reward_functions judge")
    if "judge" in args.reward_functions:
        for flag in OF_JUDGE[:2]:
            if not getattr(args, flag):
                raise ValueError(
                    f"--{flag} is missing: --reward_functions judge asks a model of an "
                    "OpenAI-compatible server (--judge_url http://host/v1 --judge_model NAME)"
                )
        settings = {name: getattr(args, name) for name in OF_JUDGE}
        SlowRewardSettings(**settings).options()
    for flag, default in OF_TESTS.items():
        if getattr(args, flag) != default and "python_tests" not in args.reward_functions:
            raise ValueError(f"--{flag} does nothing without --reward_functions python_tests")


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
