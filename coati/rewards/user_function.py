"""Reward functions of a user's own: of a file, ``path.py:function``, or given to the Python front
door, ``python:name``.

The function is called with keywords, those of the following that it names, or all when it takes
``**keywords``: prompts, responses (also as completions), gt_answers, lengths, stopped,
max_new_tokens, tags; see :class:`~coati.rewards.responses.Responses`. It returns one number per
response.
"""

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from typing import Any

from coati.rewards.registry import file_and_function
from coati.rewards.responses import Responses

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


def load_function(name: str) -> Callable[[Responses], Any]:
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
    return called_with_keywords(name, function)


def called_with_keywords(name: str, function: Callable) -> Callable[[Responses], Any]:
    """``function``, which ``name`` stands for in messages, ready to be called with a batch. Raises
    ValueError when it requires an argument that is not passed."""
    wanted = _wanted(name, function)

    def call(batch: Responses) -> Any:
        known = {
            **{key: getattr(batch, key, None) for key in KEYWORDS},
            "completions": batch.responses,
        }
        return function(**{key: known[key] for key in wanted})

    return call


def _wanted(name: str, function: Callable) -> list[str]:
    """Which of :data:`KEYWORDS` the function takes."""
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters)
    named = [
        each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
    ]
    positional = [each.name for each in parameters if each.kind is each.POSITIONAL_ONLY]
    unknown = [
        each.name for each in named if each.name not in KEYWORDS and each.default is each.empty
    ] + positional
    wanted = list(KEYWORDS) if takes_all else [each.name for each in named if each.name in KEYWORDS]
    if unknown or not wanted:
        found = f"wants {', '.join(unknown)}" if unknown else "takes none of them"
        raise ValueError(
            f"reward {name}: the function is called with {', '.join(KEYWORDS)} as keywords; it "
            f"{found}"
        )
    return wanted


def described(error: BaseException) -> str:
    """Kind and text of an error, and the innermost line of the user's code that it comes from."""
    frames = traceback.walk_tb(error.__traceback__)
    lines = [(frame.f_code.co_filename, line) for frame, line in frames]
    theirs = [f" ({file}:{n})" for file, n in lines if "importlib" not in file and file != __file__]
    return f"{type(error).__name__}: {error}{''.join(theirs[-1:])}"
