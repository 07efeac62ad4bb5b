"""From the name of a reward to the function that computes it: of the table, of a file, of the
caller, or of an endpoint."""

from collections.abc import Callable, Mapping
from typing import Any

from coati.rewards.failures import Rejected, RowFailed, Unreachable
from coati.rewards.functions import per_row
from coati.rewards.registry import REWARDS, is_file, is_given, is_url
from coati.rewards.responses import Responses
from coati.rewards.reward_options import JUDGES, PairJudgeOptions, RewardOptions
from coati.rewards.time_limit import time_limit
from coati.rewards.user_function import UserFunction, called_with_keywords, load_function
from coati.utils.environment import cpus
from coati.utils.redaction import without_credentials


def function_of(
    name: str, given: Mapping[str, Callable], timeout: float | None, options: RewardOptions
) -> UserFunction:
    """The function that ``name`` stands for; arguments and errors as of
    :class:`~coati.rewards.scorer.Rewards`."""
    if is_url(name):
        from coati.rewards.endpoint import endpoint_reward

        return UserFunction(_naming(without_credentials(name), endpoint_reward(name)), beside=True)
    if is_file(name):
        return load_function(name, options.concurrency)
    if is_given(name):
        if name not in given:
            raise ValueError(
                f"reward {name} is a Python function that the caller of coati.grpo, coati.ppo or "
                "coati.online_dpo passes; here name a function of a file, path.py:function"
            )
        return called_with_keywords(name, given[name], options.concurrency)
    if REWARDS[name].beside:
        return UserFunction(_slow(name, timeout, options), beside=True)

    def call(batch: Responses, limit: float | None) -> list[float]:
        with time_limit(limit):
            return [per_row(name, batch, row) for row in range(len(batch))]

    return UserFunction(call)


def _slow(
    name: str, timeout: float | None, options: RewardOptions
) -> Callable[[Responses, float | None], list[float]]:
    """The registered rewards that take their time, each with limits of its own."""
    if name in JUDGES:
        from coati.rewards.judge import judge_reward, pair_judge_reward

        one = options.judge if name == "judge" else options.pairwise_judge
        if one is None:
            raise ValueError(
                f"reward {name}: name an OpenAI-compatible server with --judge_url, and its model "
                "with --judge_model"
            )
        if isinstance(one, PairJudgeOptions):
            judge = pair_judge_reward(one, timeout, options.concurrency)
        else:
            judge = judge_reward(one, timeout, options.concurrency)
        return _naming(without_credentials(one.url), lambda batch, limit: judge(batch))
    from coati.rewards.code_tests import code_reward
    from coati.rewards.sandbox.sandbox import MIB, Limits

    limits = Limits(seconds=options.test_timeout, memory=options.test_memory * MIB)
    at_once = min(options.concurrency, cpus())
    tests = code_reward(limits, at_once)
    return lambda batch, limit: tests(batch)


def _naming(
    place: str, call: Callable[[Responses, float | None], Any]
) -> Callable[[Responses, float | None], Any]:
    """``call``, whose errors name the ``place`` that it asks."""

    def named(batch: Responses, limit: float | None) -> Any:
        try:
            return call(batch, limit)
        except (RowFailed, Unreachable, Rejected) as error:
            error.args = (f"({place}) {error}",)
            raise

    return named
