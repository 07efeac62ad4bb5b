"""Reward functions of a user's own: of a file, ``path.py:function``, or given to the Python front
door, ``python:name``.

The function is called with keywords, those of the following that it names, or all when it takes
``**keywords``: prompts, responses (also as completions), gt_answers, lengths, stopped,
max_new_tokens, tags; see :class:`~coati.rewards.responses.Responses`. It returns one number per
response. Or it is a function of one response: of response, prompt, gt_answer, length, stopped,
max_new_tokens and tags, and returns a number. Both may be ``async``.
"""

import asyncio
import functools
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from coati.rewards.background import EventLoop, gather_bounded
from coati.rewards.failures import RowFailed
from coati.rewards.registry import DEFAULT_CONCURRENCY, file_and_function
from coati.rewards.responses import Responses
from coati.rewards.time_limit import time_limit

KEYWORDS = (
    "prompts",
    "responses",
    "completions",
    "gt_answers",
    "lengths",
    "stopped",
    "max_new_tokens",
    "tags",
)
# Of a function of one response.
SINGULAR = ("response", "prompt", "gt_answer", "length", "stopped", "max_new_tokens", "tags")
_LOOP = EventLoop()


@dataclass(frozen=True)
class UserFunction:
    """A function that is called with a batch and a time limit in seconds. ``beside``: whether it
    waits for something else, and is computed while the next responses are sampled."""

    call: Callable[[Responses, float | None], Any]
    beside: bool = False

    def __call__(self, batch: Responses, limit: float | None = None) -> Any:
        return self.call(batch, limit)


def load_function(name: str, at_once: int = DEFAULT_CONCURRENCY) -> UserFunction:
    """The function that ``path.py:function`` names, ready to be called with a batch.

    Raises ValueError when the file cannot be run, or the function is not there, not callable, or
    requires an argument that is not passed.
    """
    path, attribute = file_and_function(name)
    if not path.is_file():
        raise ValueError(f"reward {name}: there is no file {path}")
    module_name = f"coati_reward_{path.stem}_{abs(hash(path.resolve()))}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit, too
        raise ValueError(f"reward {name}: running {path} failed: {described(error)}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"reward {name}: {path} has no function {attribute}, but {function!r}")
    return called_with_keywords(name, function, at_once)


def called_with_keywords(
    name: str, function: Callable, at_once: int = DEFAULT_CONCURRENCY
) -> UserFunction:
    """``function``, which ``name`` stands for in messages, ready to be called with a batch;
    ``at_once``: of an async function of one response, how many are awaited at a time. Raises
    ValueError when it requires an argument that is not passed."""
    one_by_one = _takes_one(function)
    wanted = _wanted(name, function, SINGULAR if one_by_one else KEYWORDS)
    waits = _is_async(function)

    def of_batch(batch: Responses) -> Any:
        known = {
            **{key: getattr(batch, key, None) for key in KEYWORDS},
            "completions": batch.responses,
        }
        return function(**{key: known[key] for key in wanted})

    def of_row(batch: Responses, row: int) -> Any:
        known = {
            "response": batch.responses[row],
            "prompt": batch.prompts[row],
            "gt_answer": batch.gt_answers[row],
            "length": batch.lengths[row],
            "stopped": batch.stopped[row],
            "max_new_tokens": batch.max_new_tokens,
            "tags": batch.tags,
        }
        return function(**{key: known[key] for key in wanted})

    def plain(batch: Responses, limit: float | None) -> Any:
        with time_limit(limit):
            if one_by_one:
                return [of_row(batch, row) for row in range(len(batch))]
            return of_batch(batch)

    def awaited(batch: Responses, limit: float | None) -> Any:
        if one_by_one:
            rounds = -(-len(batch) // at_once)
            work = _one_by_one(of_row, batch, limit, at_once)
            return _LOOP.run(work, None if limit is None else limit * rounds + 1)
        return _LOOP.run(_without_exit(of_batch(batch)), limit)

    return UserFunction(awaited if waits else plain, waits)


async def _without_exit(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """sys.exit in a coroutine would end its event loop, and whatever else waits on it."""
    try:
        return await coroutine
    except SystemExit as error:
        raise RuntimeError(f"sys.exit({error.code!r})") from error


async def _one_by_one(
    of_row: Callable[[Responses, int], Any], batch: Responses, limit: float | None, at_once: int
) -> list[Any]:
    async def one(row: int) -> Any:
        task = asyncio.ensure_future(_without_exit(of_row(batch, row)))
        done, _ = await asyncio.wait([task], timeout=limit)
        if not done:
            task.cancel()
            raise RowFailed(f"took longer than {limit:g} s", row)
        try:
            return task.result()
        except Exception as error:
            raise RowFailed(f"raised {described(error)}", row) from error

    return await gather_bounded(one, len(batch), at_once)


def _is_async(function: Callable) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    called = getattr(function, "__call__", None)  # noqa: B004
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called)


def _takes_one(function: Callable) -> bool:
    """Whether the function is one of a single response."""
    parameters = inspect.signature(function).parameters
    return "response" in parameters and not {"responses", "completions"} & set(parameters)


def _wanted(name: str, function: Callable, keywords: tuple[str, ...]) -> list[str]:
    """Which of ``keywords`` the function takes."""
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters)
    named = [
        each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
    ]
    positional = [each.name for each in parameters if each.kind is each.POSITIONAL_ONLY]
    unknown = [
        each.name for each in named if each.name not in keywords and each.default is each.empty
    ] + positional
    wanted = list(keywords) if takes_all else [each.name for each in named if each.name in keywords]
    if unknown or not wanted:
        found = f"wants {', '.join(unknown)}" if unknown else "takes none of them"
        raise ValueError(
            f"reward {name}: the function is called with {', '.join(keywords)} as keywords; it "
            f"{found}"
        )
    return wanted


def described(error: BaseException) -> str:
    """Kind and text of an error, and the innermost line of the user's code that it comes from."""
    frames = traceback.walk_tb(error.__traceback__)
    lines = [(frame.f_code.co_filename, line) for frame, line in frames]
    theirs = [f" ({file}:{n})" for file, n in lines if "importlib" not in file and file != __file__]
    return f"{type(error).__name__}: {error}{''.join(theirs[-1:])}"
