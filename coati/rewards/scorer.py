"""The reward functions of a run: their rewards for a batch of responses, and the weighted sum."""

import math
import reprlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from coati.rewards.background import in_background
from coati.rewards.failures import Rejected, RowFailed, Unreachable
from coati.rewards.ray_tasks import can_be_a_task, task_function
from coati.rewards.registry import (
    DEFAULT_TIMEOUT,
    GIVEN,
    REWARDS,
    check_rewards,
    file_and_function,
    is_file,
    is_url,
)
from coati.rewards.responses import Responses
from coati.rewards.reward_options import DEFAULT, JUDGES, RewardOptions
from coati.rewards.sources import function_of
from coati.rewards.tags import check_tags
from coati.rewards.time_limit import Overrun
from coati.rewards.user_function import UserFunction, described

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 160


@dataclass(frozen=True)
class RewardResult:
    """``total`` (B): the weighted sum for each response, which is trained on. ``parts``: name ->
    (B) unweighted rewards of that function, for logging."""

    total: list[float]
    parts: dict[str, list[float]]


class Rewards:
    """The reward functions of a run.

    Args:
        names: names in :data:`~coati.rewards.registry.REWARDS`, ``path.py:function``, the URL of
            an endpoint (:mod:`coati.rewards.endpoint`), or ``python:name`` of a function in
            ``given``.
        weights: one per name; by default 1.
        tags: response_format_tags of the conversation template; with them only a response in that
            format can be right.
        timeout: seconds that a function may take for a batch, an endpoint for a request, and an
            async function of one response for each; None: no limit.
        given: Python functions by their names, called as those of files are.
        options: of what takes its time.

    Raises:
        ValueError: from :func:`~coati.rewards.registry.check_rewards` and
            :func:`~coati.rewards.user_function.load_function`, for invalid or missing tags, for a
            ``python:name`` that is not given, a judge without options, and programs that cannot be
            isolated here.
    """

    def __init__(
        self,
        names: list[str],
        weights: list[float] | None = None,
        tags: dict | None = None,
        timeout: float | None = DEFAULT_TIMEOUT,
        given: Mapping[str, Callable] | None = None,
        options: RewardOptions = DEFAULT,
    ) -> None:
        resolved = check_rewards(names, weights)
        if not resolved:
            raise ValueError(
                f"no reward function is given; there are {', '.join(REWARDS)}, path.py:function, "
                "and http://host/path"
            )
        if tags is not None:
            check_tags(tags)
        for name in resolved:
            if name in REWARDS and REWARDS[name].tags and tags is None:
                raise ValueError(
                    f"reward {name} looks for the tags of a response, and the conversation "
                    "template has no response_format_tags; add them to the template file, or leave "
                    "the reward out"
                )
        self.tags = tags
        self.timeout = timeout
        self.needs_gt_answer = any(_needs_gt_answer(name, options) for name in resolved)
        self.weights = dict(zip(_labels(resolved), weights or [1.0] * len(resolved), strict=True))
        functions = [_function(name, given or {}, timeout, options) for name in resolved]
        self._functions = dict(zip(self.weights, functions, strict=True))

    @property
    def beside(self) -> bool:
        """Whether a function waits for something outside of this thread."""
        return any(function.beside for function in self._functions.values())

    def __call__(self, batch: Responses) -> RewardResult:
        """Score ``batch``.

        Raises:
            ValueError: naming the function and the response, if a function raises, exceeds the
                timeout, or returns anything but one finite number per response.
        """
        return self.begin(batch)()

    def begin(self, batch: Responses) -> Callable[[], RewardResult]:
        """Begin to score ``batch``: what waits for something else does so in threads. The result,
        and what :meth:`__call__` raises, come from calling what is returned."""
        if batch.tags is None and self.tags is not None:
            batch = replace(batch, tags=self.tags)
        begun: dict[str, Future] = {
            label: in_background(self._rewards_of, label, function, batch)
            for label, function in self._functions.items()
            if function.beside
        }

        def result() -> RewardResult:
            parts = {
                label: begun[label].result()
                if label in begun
                else self._rewards_of(label, function, batch)
                for label, function in self._functions.items()
            }
            weighted = [
                [self.weights[label] * value for value in values] for label, values in parts.items()
            ]
            return RewardResult([sum(values) for values in zip(*weighted, strict=True)], parts)

        return result

    def _rewards_of(self, label: str, function: UserFunction, batch: Responses) -> list[float]:
        try:
            result = function(batch, self.timeout)
        except KeyboardInterrupt:
            raise
        except RowFailed as error:
            raise ValueError(f"reward {label} {error}; {_sample(batch, error.row)}") from error
        except Unreachable as error:
            raise ValueError(f"reward {label} {error}") from error
        except BaseException as error:  # sys.exit, too, ends the run as a failure
            what = str(error) if isinstance(error, Rejected) else f"raised {described(error)}"
            limit = self.timeout
            if isinstance(error, Overrun):
                what = f"took longer than {limit:g} s for {len(batch)} responses"
            limit = None if limit is None else limit / max(len(batch), 1)
            alone = (row for row in range(len(batch)) if _fails(function, batch.row(row), limit))
            where = next(
                (_sample(batch, row) for row in alone),
                f"none of the {len(batch)} responses causes it alone",
            )
            raise ValueError(f"reward {label} {what}; {where}") from error
        return _checked(label, result, batch)


def _function(
    name: str, given: Mapping[str, Callable], timeout: float | None, options: RewardOptions
) -> UserFunction:
    if options.ray_address is not None and can_be_a_task(name):
        return task_function(name, timeout, options)
    return function_of(name, given, timeout, options)


def _needs_gt_answer(name: str, options: RewardOptions) -> bool:
    if name in JUDGES:
        judge = options.judge if name == "judge" else options.pairwise_judge
        return judge is not None and "gt_answer" in judge.places
    return name in REWARDS and REWARDS[name].gt_answer


def _labels(names: list[str]) -> list[str]:
    """The names to log: of ``path.py:function`` only the function, of a URL the last part of its
    path, or its host, unless two share that name."""
    short = [_label(name) for name in names]
    return [
        name if short.count(label) > 1 else label for name, label in zip(names, short, strict=True)
    ]


def _label(name: str) -> str:
    if is_url(name):
        parts = urlsplit(name)
        return parts.path.strip("/").rpartition("/")[2] or parts.netloc
    return file_and_function(name)[1] if is_file(name) else name.removeprefix(GIVEN)


def _fails(function: UserFunction, batch: Responses, limit: float | None) -> bool:
    try:
        function(batch, limit)
    except KeyboardInterrupt:
        raise
    except BaseException:
        return True
    return False


def _sample(batch: Responses, row: int) -> str:
    prompt = _SHORT.repr(batch.prompts[row])
    response = _SHORT.repr(batch.responses[row])
    return (
        f"response {batch.numbers[row]} of the batch: prompt {prompt}, response {response}, "
        f"gt_answer {batch.gt_answers[row]!r}"
    )


def _checked(label: str, result: Any, batch: Responses) -> list[float]:
    """``result`` (a sequence, tensor or array) as a list of finite floats, one per response."""
    values = result.tolist() if hasattr(result, "tolist") else result
    kind = type(result).__name__
    wanted = f"expected a list of {len(batch)} numbers, one per response"
    if not isinstance(values, list | tuple):
        raise ValueError(f"reward {label} returned {_SHORT.repr(result)} ({kind}); {wanted}")
    if len(values) != len(batch):
        raise ValueError(
            f"reward {label} returned {len(values)} values ({_SHORT.repr(values)}); {wanted}"
        )
    numbers = []
    for row, value in enumerate(values):
        value = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(
                f"reward {label} returned {_SHORT.repr(value)} ({type(value).__name__}) for "
                f"{_sample(batch, row)}; expected a finite number"
            )
        numbers.append(float(value))
    return numbers
