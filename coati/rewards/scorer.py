"""The reward functions of a run: their rewards for a batch of responses, and the weighted sum."""

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from coati.rewards.functions import per_row
from coati.rewards.registry import (
    GIVEN,
    REWARDS,
    check_rewards,
    file_and_function,
    is_file,
    is_given,
)
from coati.rewards.responses import Responses
from coati.rewards.tags import check_tags
from coati.rewards.time_limit import Overrun, time_limit
from coati.rewards.user_function import called_with_keywords, described, load_function

DEFAULT_TIMEOUT = 60.0
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
        names: names in :data:`~coati.rewards.registry.REWARDS`, ``path.py:function``, or
            ``python:name`` of a function in ``given``.
        weights: one per name; by default 1.
        tags: response_format_tags of the conversation template; with them only a response in that
            format can be right.
        timeout: seconds that a function may take for a batch; None: no limit.
        given: Python functions by their names, called as those of files are.

    Raises:
        ValueError: from :func:`~coati.rewards.registry.check_rewards` and
            :func:`~coati.rewards.user_function.load_function`, for invalid or missing tags, and
            for a ``python:name`` that is not given.
    """

    def __init__(
        self,
        names: list[str],
        weights: list[float] | None = None,
        tags: dict | None = None,
        timeout: float | None = DEFAULT_TIMEOUT,
        given: Mapping[str, Callable] | None = None,
    ) -> None:
        resolved = check_rewards(names, weights)
        if not resolved:
            raise ValueError(
                f"no reward function is given; there are {', '.join(REWARDS)}, and path.py:function"
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
        self.needs_gt_answer = any(name in REWARDS and REWARDS[name].gt_answer for name in resolved)
        self.weights = dict(zip(_labels(resolved), weights or [1.0] * len(resolved), strict=True))
        functions = [_function(name, given or {}) for name in resolved]
        self._functions = dict(zip(self.weights, functions, strict=True))

    def __call__(self, batch: Responses) -> RewardResult:
        """Score ``batch``.

        Raises:
            ValueError: naming the function and the response, if a function raises, exceeds the
                timeout, or returns anything but one finite number per response.
        """
        if batch.tags is None and self.tags is not None:
            batch = replace(batch, tags=self.tags)
        parts = {
            label: self._rewards_of(label, function, batch)
            for label, function in self._functions.items()
        }
        weighted = [
            [self.weights[label] * value for value in values] for label, values in parts.items()
        ]
        return RewardResult([sum(values) for values in zip(*weighted, strict=True)], parts)

    def _rewards_of(
        self, label: str, function: Callable[[Responses], Any], batch: Responses
    ) -> list[float]:
        try:
            with time_limit(self.timeout):
                result = function(batch)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit, too, ends the run as a failure
            what = f"raised {described(error)}"
            limit = self.timeout
            if isinstance(error, Overrun):
                what = f"took longer than {limit:g} s for {len(batch)} responses"
                limit /= max(len(batch), 1)
            alone = (row for row in range(len(batch)) if _fails(function, batch.row(row), limit))
            where = next(
                (_sample(batch, row) for row in alone),
                f"none of the {len(batch)} responses causes it alone",
            )
            raise ValueError(f"reward {label} {what}; {where}") from error
        return _checked(label, result, batch)


def _labels(names: list[str]) -> list[str]:
    """The names to log: of ``path.py:function`` only the function, unless two share that name."""
    short = [
        file_and_function(name)[1] if is_file(name) else name.removeprefix(GIVEN) for name in names
    ]
    return [
        name if short.count(label) > 1 else label for name, label in zip(names, short, strict=True)
    ]


def _function(name: str, given: Mapping[str, Callable]) -> Callable[[Responses], Any]:
    if is_file(name):
        return load_function(name)
    if is_given(name):
        if name not in given:
            raise ValueError(
                f"reward {name} is a Python function that the caller of coati.grpo or coati.ppo "
                "passes; here name a function of a file, path.py:function"
            )
        return called_with_keywords(name, given[name])
    return lambda batch: [per_row(name, batch, row) for row in range(len(batch))]


def _fails(function: Callable[[Responses], Any], batch: Responses, limit: float | None) -> bool:
    try:
        with time_limit(limit):
            function(batch)
    except KeyboardInterrupt:
        raise
    except BaseException:
        return True
    return False


def _sample(batch: Responses, row: int) -> str:
    prompt = _SHORT.repr(batch.prompts[row])
    response = _SHORT.repr(batch.responses[row])
    return (
        f"response {row} of the batch: prompt {prompt}, response {response}, gt_answer "
        f"{batch.gt_answers[row]!r}"
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
