"""Python keywords as command-line words: a function of the front door takes exactly the flags of
its command, read and checked by the same parser."""

import inspect
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from coati.cli.aliases import add_aliases
from coati.cli.parser import FlagError, Parser, errors_raised

F = TypeVar("F", bound=Callable[..., Any])
S = TypeVar("S")
NOT_HERE = ("help",)
# The command starts processes; a function runs in those that there are.
LAUNCH = ("nproc", "hostfile", "master_addr", "master_port")


def canonical_names(parser: Parser, keywords: Mapping[str, Any], function: str) -> dict[str, Any]:
    """``keywords`` with flags under their first names. Raises TypeError for one that is no flag,
    with the nearest, and for two names of one flag."""
    add_aliases(parser)
    found: dict[str, str] = {}  # flag -> the keyword for it
    for name in keywords:
        action = parser.action_of(f"--{name}")
        if action is None or name in NOT_HERE:
            hint = parser.nearest(f"--{name}").replace("--help", f"help({function})")
            raise TypeError(f"{function}: unknown keyword {name!r}{hint.replace('--', '')}")
        flag = name if action.dest.startswith("_") else action.dest
        if flag in found:
            raise TypeError(f"{function}: {found[flag]} and {name} set the same; give one of them")
        found[flag] = name
    return {flag: keywords[name] for flag, name in found.items()}


def words_of(keywords: Mapping[str, Any], function: str) -> list[str]:
    """``keywords`` as command-line words; None leaves a flag at its default. Raises TypeError for a
    value that no command line could hold."""
    words = []
    for name, value in keywords.items():
        if value is None:
            continue
        if isinstance(value, list | tuple):
            if value:
                words += [f"--{name}", *(_word(each, name, function) for each in value)]
        else:
            words.append(f"--{name}={_word(value, name, function)}")
    return words


def _word(value: Any, name: str, function: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    if isinstance(value, int | float):
        return repr(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # of NumPy or PyTorch
        return repr(value.item())
    raise TypeError(
        f"{function}: {name} is {type(value).__name__}; expected a text, a number, True or False, "
        "or a list of them"
    )


def parsed(parse: Callable[[list[str]], S], words: list[str], function: str) -> S:
    """The settings that ``parse`` makes of ``words``. Raises ValueError with the command's own
    message."""
    try:
        with errors_raised():
            return parse(words)
    except FlagError as error:
        raise ValueError(f"{function}: {error}") from None


def takes_flags_of(make: Callable[[], Parser]) -> Callable[[F], F]:
    """Decorator: the flags of the parser that ``make`` gives join the signature and the docstring
    of a function that takes them as ``**flags``, for ``help`` and completion."""
    hidden = {*NOT_HERE, *LAUNCH}

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        hidden.update(each.name for each in own)
        flags = [a for a in make().documented() if a.dest not in hidden and a.option_strings]
        keywords = [
            inspect.Parameter(flag.dest, inspect.Parameter.KEYWORD_ONLY, default=flag.default)
            for flag in flags
        ]
        function.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*own, *keywords]
        )
        lines = [f"    {flag.dest}: {_help(flag)}" for flag in flags]
        function.__doc__ = "\n".join([inspect.getdoc(function), "", "Flags:", *lines, ""])
        return function

    return decorate


def _help(flag: Any) -> str:
    text = re.sub("--(?=[a-z])", "", (flag.help or "").replace("%%", "%"))
    silent = flag.default in (None, [], "==SUPPRESS==") or flag.default is False
    return text if silent or "default" in text else f"{text} (default: {flag.default})"
