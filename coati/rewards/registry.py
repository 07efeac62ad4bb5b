"""The table of built-in reward functions, and checks of their names. Light: parsers import it."""

import ast
import difflib
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from coati.utils.redaction import without_credentials

DEFAULT_TIMEOUT = 60.0
DEFAULT_CONCURRENCY = 16
SCHEMES = ("http", "https")


@dataclass(frozen=True)
class Reward:
    """One row of the table; the function is registered in :mod:`coati.rewards.functions`.

    ``about``: what it rewards. ``scale``: its possible values. ``gt_answer``: whether it needs each
    row's ground truth. ``tags``: whether it needs the template's response_format_tags.
    ``beside``: whether it takes long, and so is computed while the next responses are sampled
    (:mod:`coati.rewards.sources`). ``right``: what a right response gets, of a function that
    compares with the ground truth.
    """

    about: str
    scale: str
    gt_answer: bool = False
    tags: bool = False
    beside: bool = False
    right: float | None = None


REWARDS: dict[str, Reward] = {
    "gsm8k": Reward(
        "a whole number as the final answer",
        "10 right, 1 well formed, 0 else",
        gt_answer=True,
        right=10.0,
    ),
    "math_competition": Reward(
        "any mathematical final answer",
        "10 right, 1 well formed, 0 else",
        gt_answer=True,
        right=10.0,
    ),
    "format": Reward(
        "thoughts and answer in the template's tags, in their order",
        "1 or 0",
        tags=True,
    ),
    "length": Reward(
        "short responses; a negative weight asks for long ones",
        "minus the share of the room that the response takes",
    ),
    "python_tests": Reward(
        "programs that pass the tests of gt_answer, run in a sandbox",
        "the share of the tests that pass",
        gt_answer=True,
        beside=True,
        right=1.0,
    ),
    "judge": Reward(
        "whatever the prompt of --judge_prompt asks a model of --judge_url to judge",
        "the score in its verdict",
        beside=True,
    ),
    "pairwise_judge": Reward(
        "responses that a model of --judge_url finds better than the others to the same prompt, "
        "each two shown in both orders",
        "the share of these comparisons that the response wins",
        beside=True,
    ),
}
# Names of earlier releases.
ALIASES = {"gsm8k_reward_fn": "gsm8k", "math_competition_reward_fn": "math_competition"}

GIVEN = "python:"


def is_file(name: str) -> bool:
    """Whether ``name`` is a function in a file, ``path.py:function``."""
    return not is_url(name) and (name.rpartition(":")[0].endswith(".py") or name.endswith(".py"))


def is_given(name: str) -> bool:
    """Whether ``name`` stands for a Python function that a caller passes, ``python:name``."""
    return name.startswith(GIVEN)


def is_url(name: str) -> bool:
    """Whether ``name`` is the address of an endpoint."""
    return name.partition("://")[0].lower() in SCHEMES and "://" in name


def check_url(what: str, url: str) -> None:
    """Raise ValueError where ``url``, the value of ``what``, is none, or holds a password."""
    try:
        parts = urllib.parse.urlsplit(url)
        found = bool(parts.hostname) and parts.port != 0 and parts.scheme.lower() in SCHEMES
    except ValueError:
        found = False
    if not found or any(letter.isspace() for letter in url):
        shown = without_credentials(url)
        raise ValueError(f"{what} {shown}: expected a URL such as http://host:8000/score")
    if without_credentials(url) != url:
        raise ValueError(
            f"{what} {without_credentials(url)}: what is in a URL ends up in logs; put the token "
            "into the environment, COATI_REWARD_TOKEN or COATI_JUDGE_KEY"
        )


def check_rewards(names: list[str], weights: list[float] | None = None) -> list[str]:
    """``names`` with aliases resolved. A file is parsed, not executed; a URL is not asked.

    Raises:
        ValueError: for an unknown name, a file or function that does not exist, a URL that is none
            or holds a password, a repeated name, and a number of weights other than that of names.
    """
    own = (is_url, is_file, is_given)
    resolved = [
        name if any(is_one(name) for is_one in own) else _registered(name) for name in names
    ]
    for name in resolved:
        if resolved.count(name) > 1:
            raise ValueError(
                f"reward {name} is given twice; give it once, with a larger --reward_weights"
            )
        if is_url(name):
            check_url("reward", name)
        elif is_file(name):
            _check_file(name)
    if weights is not None and len(weights) != len(names):
        raise ValueError(
            f"--reward_weights has {len(weights)} values, --reward_functions {len(names)} names "
            f"({' '.join(names)}); give one weight for each name"
        )
    return resolved


def _registered(name: str) -> str:
    name = ALIASES.get(name, name)
    if name in REWARDS:
        return name
    if set(name.split(",")) <= {*REWARDS, *ALIASES}:
        apart = name.replace(",", " ")
        raise ValueError(f"unknown reward {name!r}; separate names by spaces: {apart}")
    nearest = difflib.get_close_matches(name, [*REWARDS, *ALIASES], n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else "."
    raise ValueError(
        f"unknown reward {name!r}{hint} There are {', '.join(REWARDS)}, path.py:function of "
        "your own, and http://host/path"
    )


def file_and_function(name: str) -> tuple[Path, str]:
    """Split ``path.py:function``. Raises ValueError if the function is missing."""
    path, _, function = name.rpartition(":")
    if not path or not function.isidentifier():
        raise ValueError(
            f"reward {name}: name the function too, as in {name.rstrip(':')}:my_reward"
        )
    return Path(path), function


def _check_file(name: str) -> None:
    path, function = file_and_function(name)
    if not path.is_file():
        raise ValueError(f"reward {name}: there is no file {path}")
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except SyntaxError as error:
        raise ValueError(f"reward {name}: {path}:{error.lineno}: {error.msg}") from error
    except ValueError as error:  # null bytes
        raise ValueError(f"reward {name}: {path} is no Python file ({error})") from error
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    defined = [node.name for node in tree.body if isinstance(node, kinds)]
    assigned = [
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    ]
    imported = [
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    ]
    if function not in [*defined, *assigned, *imported] and "*" not in imported:
        found = f"it defines {', '.join(defined)}" if defined else "it defines no function"
        raise ValueError(f"reward {name}: {path} has no {function}; {found}")
