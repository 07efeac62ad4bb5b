"""Reward functions as tasks of a Ray cluster: any of its hosts computes a batch, and Ray repeats
what was lost with a process or a host."""

from functools import cache
from pathlib import Path
from typing import Any

from coati.rewards.failures import Rejected, Unreachable
from coati.rewards.registry import is_file, is_given, is_url
from coati.rewards.responses import Responses
from coati.rewards.reward_options import JUDGES, RewardOptions
from coati.rewards.sources import function_of
from coati.rewards.time_limit import Overrun
from coati.rewards.user_function import UserFunction, described
from coati.utils.logging import get_logger
from coati.utils.ray_cluster import AUTO, connect, head_answers

logger = get_logger(__name__)

SETTINGS = ("concurrency", "test_timeout", "test_memory")
TASK_CPUS = 0.0  # of the cluster: a task that had to wait for a whole CPU might wait for ever
LOOK_S = 15.0
LOST_S = 60.0
Found = tuple[str, Any]  # "rewards", or how it failed, and what is said of that


def can_be_a_task(name: str) -> bool:
    """Whether the function is one that computes: endpoints and judges are asked by the training
    processes, and what a Python caller passes is theirs alone."""
    return not (is_url(name) or is_given(name) or name in JUDGES)


def task_function(name: str, timeout: float | None, options: RewardOptions) -> UserFunction:
    """The reward ``name`` as tasks of the cluster of ``options``. Raises ValueError for what is
    wrong with the function, and for a cluster that this host cannot join."""
    function_of(name, {}, timeout, options)
    settings = {key: getattr(options, key) for key in SETTINGS}
    try:
        ray = connect(options.ray_address or AUTO)
    except ValueError as error:
        raise ValueError(f"--rewards_on_ray: --ray_address {error}") from error
    task = ray.remote(num_cpus=TASK_CPUS, max_retries=-1, scheduling_strategy="SPREAD")(compute)
    if is_file(name):
        path, _, attribute = name.rpartition(":")
        name = f"{Path(path).absolute()}:{attribute}"

    def call(batch: Responses, limit: float | None) -> Any:
        given = {"max_new_tokens": batch.max_new_tokens, "tags": batch.tags, **batch.columns()}
        given["num_generations"] = batch.num_generations
        how, found = _waited(ray, task.remote(name, given, limit, settings))
        if how == "overrun":
            raise Overrun
        if how == "failed":
            raise Rejected(found)
        return found

    return UserFunction(call, beside=True)


def compute(
    name: str, given: dict[str, Any], limit: float | None, settings: dict[str, Any]
) -> Found:
    """Run by a worker of the cluster. What a function raises is told, not raised: its class may not
    be known to the training process."""
    try:
        found = _function(name, limit, tuple(sorted(settings.items())))(Responses(**given), limit)
        return "rewards", found.tolist() if hasattr(found, "tolist") else found
    except Overrun:
        return "overrun", None
    except BaseException as error:
        return "failed", f"raised {described(error)}"


@cache
def _function(name: str, timeout: float | None, settings: tuple) -> UserFunction:
    return function_of(name, {}, timeout, RewardOptions(**dict(settings)))


def _waited(ray: Any, answer: Any) -> Found:
    """As long as the cluster may take, if it is there."""
    lost = 0.0
    while True:
        try:
            return ray.get(answer, timeout=LOOK_S)
        except ray.exceptions.GetTimeoutError as error:
            lost = 0.0 if head_answers(ray) else lost + LOOK_S
            logger.warning_once(
                f"a reward of --rewards_on_ray takes more than {LOOK_S:g} s: where others compute "
                "on the Ray cluster, it may be waiting for a process there"
            )
            if lost >= LOST_S:
                raise Unreachable(
                    "(Ray) the head of the cluster does not answer any more"
                ) from error
        except ray.exceptions.RayError as error:
            said = " ".join(str(error).split())[-300:]
            raise Unreachable(f"(Ray) {said}") from error
