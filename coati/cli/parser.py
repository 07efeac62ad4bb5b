"""The one parser class: unknown flags are refused with the nearest known one, and flags may come
from a YAML file or the ``arguments.json`` of an earlier run."""

import argparse
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn, Protocol

from coati.cli.aliases import Refused, add_aliases, is_alias, sets, settle
from coati.cli.nearest import nearest_flag, surely_meant, verbs_with
from coati.cli.trackers import settle_trackers
from coati.utils.logging import get_logger
from coati.utils.resources import near_recipes, recipe_path

logger = get_logger(__name__)


class FlagError(ValueError):
    """What a parser finds wrong, inside :func:`errors_raised`."""


MOST_VERBS = 3  # that are named where a flag is of others


_raising: ContextVar[bool] = ContextVar("raising", default=False)


@contextmanager
def errors_raised() -> Iterator[None]:
    """Parsers raise FlagError meanwhile instead of ending the process: for callers that are no
    command line."""
    token = _raising.set(True)
    try:
        yield
    finally:
        _raising.reset(token)


class _Help(argparse.HelpFormatter):
    """Adds the default to a flag's help where the default says something."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=120)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        # By identity: a default of 0 equals False, and says something.
        silent = any(action.default is nothing for nothing in (None, False, argparse.SUPPRESS))
        if silent or action.default == [] or "default" in text:
            return text
        return f"{text} (default: %(default)s)"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # argparse repeats the value's name after each spelling; once is enough.
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"


class OlderFlags(Protocol):
    """Flags of earlier releases, which a parser takes without offering them (coati.legacy)."""

    def add(self, parser: "Parser") -> None: ...

    def apply(self, args: argparse.Namespace) -> None:
        """Turn what was given into today's flags. Raises ValueError naming an older flag."""


class Parser(argparse.ArgumentParser):
    """The flags of one script.

    An unknown flag is refused with the nearest known one, an ambiguous prefix with all that it may
    mean. ``--config FILE.yaml`` stands for the flags written in the file; flags on the command line
    override it.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=_Help, **kwargs)
        # argparse's own takes -1e-5 for a flag.
        self._negative_number_matcher = re.compile(r"-\.?\d")
        self.add_argument(
            "--config",
            metavar="FILE",
            help="read flags from this YAML (or JSON) file; the command line overrides it",
        )

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:  # type: ignore[override]
        """As argparse; exits with code 2 and one line that names the flag when something is
        wrong."""
        add_aliases(self)
        argv = self._in_full(sys.argv[1:] if args is None else args)
        self._check_named_once(argv)
        words = self._from_file(argv) + argv
        parsed, unread = self.parse_known_args(words, namespace)
        if unread:
            self.error(
                f"{' '.join(unread)}: a value without a flag before it; --help lists the flags"
            )
        try:
            settle(parsed)
            settle_trackers(parsed)
        except ValueError as error:
            self.error(str(error))
        # For reports, which tell what was chosen from what follows from it.
        parsed._given = sorted(
            action.dest
            for action in self.documented()
            if action.dest != "config"
            and getattr(parsed, action.dest, action.default)
            not in (action.default, [action.default])
        )
        # For defaults that follow the model: what was written stands, also if it is the default.
        named = (self.action_of(word.partition("=")[0]) for word in words)
        parsed._written = sorted({action.dest for action in named if action is not None})
        return parsed

    def error(self, message: str) -> NoReturn:
        """One line instead of the usage text, from one process per machine. Raises FlagError inside
        :func:`errors_raised`."""
        if _raising.get():
            raise FlagError(message)
        if os.environ.get("LOCAL_RANK", "0") != "0":
            # The same line from every process would bury it. A launcher ends all processes with the
            # first that fails, so those that stay silent leave the speaking one the time to speak.
            time.sleep(1.0)
            raise SystemExit(2)
        self.exit(2, f"{self.prog}: error: {message}\n")

    def named(self, prog: str | None) -> "Parser":
        """This parser, which messages and help call ``prog``; None leaves its name."""
        self.prog = prog or self.prog
        return self

    def names(self) -> list[str]:
        """The public spelling of every documented flag, with its aliases, in the order of the
        help."""
        return [name for action in self.documented() for name in action.option_strings]

    def documented(self) -> list[argparse.Action]:
        """The flags that the help shows: those of older documents are accepted but not offered."""
        return [action for action in self._actions if action.help != argparse.SUPPRESS]

    def action_of(self, name: str) -> argparse.Action | None:
        """The action behind a flag's exact name (with dashes), or None."""
        return self._option_string_actions.get(name)

    def nearest(self, name: str) -> str:
        """``"; did you mean --x?"``, by spelling and by meaning, or where to look when nothing is
        near."""
        word = name.lstrip("-")
        known = [
            (action, flag.lstrip("-"))
            for action in self.documented()
            for flag in action.option_strings
            if flag.startswith("--")
        ]
        own = {flag: action.option_strings[0].lstrip("-") for action, flag in known}
        others = [
            (option.lstrip("-"), own[action.dest])
            for option, action in self._option_string_actions.items()
            if action.help == argparse.SUPPRESS and action.dest in own
        ]
        if word.lower().startswith("no_") and self._is_switch(word[3:]):
            return f"; did you mean --{word[3:].lower()} false?"
        if not surely_meant(word, own, others) and (verbs := verbs_with(word)):
            more = f" and {len(verbs) - MOST_VERBS} others" if len(verbs) > MOST_VERBS else ""
            return f"; it is a flag of coati {', '.join(verbs[:MOST_VERBS])}{more}, not of this"
        near = nearest_flag(word, own, others)
        return f"; did you mean --{own.get(near, near)}?" if near else "; --help lists the flags"

    def _is_switch(self, name: str) -> bool:
        action = self.action_of(f"--{name.lower()}")
        return action is not None and action.nargs == "?" and action.const is True

    def _check_named_once(self, argv: list[str]) -> None:
        """A flag that is given under two names has two values, of which one would be lost. Those of
        earlier releases say themselves what they became."""
        named: dict[str, str] = {}
        for position, word in enumerate(argv):
            if word == "--":
                return
            name, equals, value = word.partition("=")
            action = self.action_of(name) if self._is_flag(word) else None
            if action is None or (action.help == argparse.SUPPRESS and not is_alias(action)):
                continue
            if not equals and argv[position + 1 : position + 2]:
                following = argv[position + 1]
                value = "" if self._is_flag(following) else following
            for dest in self._set_by(action, value):
                if named.setdefault(dest, name) != name:
                    self.error(f"{named[dest]} and {name} set the same; give one of the two")

    def _set_by(self, action: argparse.Action, value: str) -> tuple[str, ...]:
        try:
            return sets(action, value or None)
        except (argparse.ArgumentTypeError, KeyError):
            return ()  # refused with its own message when it is read

    def _in_full(self, argv: Iterable[str]) -> list[str]:
        words = list(argv)
        unknown = []
        for position, word in enumerate(words):
            if word == "--":
                break
            if self._is_flag(word):
                name, equals, value = word.partition("=")
                if (full := self._full_name(name)) is None:
                    unknown.append(name)
                else:
                    words[position] = full + equals + value
        if unknown:
            self.error("; ".join(f"unknown flag {name}{self.nearest(name)}" for name in unknown))
        return words

    def _is_flag(self, word: str) -> bool:
        # argparse's own rule: negative numbers and words with a space are values.
        return (
            len(word) > 1
            and word[0] == "-"
            and " " not in word
            and not self._negative_number_matcher.match(word)
        )

    def _full_name(self, name: str) -> str | None:
        if name in self._option_string_actions:
            return name
        underscored = f"--{name.lstrip('-').replace('-', '_')}"
        if name.startswith("--") and underscored in self._option_string_actions:
            return underscored
        begins_alike = [
            a
            for a in self.documented()
            if any(known.startswith(name) for known in a.option_strings)
        ]
        meant = [action.option_strings[0] for action in begins_alike]
        if len(name) > 2 and len(meant) == 1:
            logger.warning_once(
                f"{name} is read as {meant[0]}; write it in full, a later flag may begin alike"
            )
            return meant[0]
        if len(name) > 2 and len(meant) > 1:
            self.error(f"{name} may mean {' or '.join(meant)}; write it in full")
        return None

    def _from_file(self, argv: list[str]) -> list[str]:
        probe = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        probe.add_argument("--config", nargs="?")
        path = probe.parse_known_args(argv)[0].config
        if path is None:
            return []
        given = [word for word in argv if word == "--config" or word.startswith("--config=")]
        if len(given) > 1:
            self.error("two configurations are given; one file holds the flags of a run")
        recipe = recipe_path(path)
        if recipe is not None:
            logger.info(f"{path} is the recipe {recipe}")
        try:
            return file_words(self, recipe or path)
        except ValueError as error:
            self.error(str(error))


def file_words(parser: Parser, path: str | os.PathLike) -> list[str]:
    """The flags of a YAML (or JSON) mapping as command-line words, each value checked against its
    flag.

    Raises ValueError with file and line for text that is not YAML, a key that is no flag (with the
    nearest one), a key given twice and a value that its flag refuses.
    """
    add_aliases(parser)
    words: list[str] = []
    seen: dict[str, int] = {}
    for key, node, line in _entries(path):
        where = f"{path}:{line}"
        name = f"--{key.replace('-', '_')}"
        action = parser.action_of(name)
        if action is None or isinstance(action, argparse._HelpAction):
            hint = parser.nearest(name).replace("--", "").replace(" false?", ": false?")
            raise ValueError(f"{where}: unknown key {key!r}{hint}")
        if isinstance(action, Refused):
            raise ValueError(f"{where}: {key}: {action.difference}")
        values = _texts(node, where, key)
        # `null` leaves the default; a file written by an earlier run may name the --config that it
        # came from.
        if not values or action.dest == "config":
            continue
        count = action.nargs if isinstance(action.nargs, int) else 1
        if action.nargs != "+" and (len(values) > 1 or count > 1) and len(values) != count:
            takes = "one value" if count == 1 else f"{count} values"
            raise ValueError(f"{where}: {key!r} takes {takes}, found {len(values)}")
        try:
            parser._get_values(action, values)
        except argparse.ArgumentError as error:
            raise ValueError(f"{where}: {key}: {error.message}") from error
        for dest in sets(action, values[0]):
            if dest in seen:
                raise ValueError(f"{where}: {key!r} repeats line {seen[dest]}; keep one of the two")
            seen[dest] = line
        words += [f"{name}={values[0]}"] if len(values) == 1 else [name, *values]
    return words


def _entries(path: str | os.PathLike) -> list[tuple[str, Any, int]]:
    import yaml

    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ValueError(
            f"--config {path}: {error.strerror}; expected a YAML file of flags{_recipes_near(path)}"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--config {path}: byte {error.start} is not UTF-8; expected a YAML file of flags"
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ValueError(
            f"{path}{line}: not valid YAML ({getattr(error, 'problem', None) or error})"
        ) from error
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path}:1: expected lines of the form 'flag: value', found a {root.id}")
    return [(key.value, node, key.start_mark.line + 1) for key, node in root.value]


def _recipes_near(path: str | os.PathLike) -> str:
    near = near_recipes(path)
    return f", or a recipe: {' or '.join(near)}" if near else ""


def _texts(node: Any, where: str, key: str) -> list[str]:
    """The words of one YAML value, as written (5e-6 stays text, so that the flag's own type reads
    it)."""
    import yaml

    if isinstance(node, yaml.SequenceNode):
        return [text for item in node.value for text in _texts(item, where, key)]
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError(f"{where}: {key!r} holds a mapping; expected a value or a list of values")
    return [] if node.tag == "tag:yaml.org,2002:null" else [node.value]
