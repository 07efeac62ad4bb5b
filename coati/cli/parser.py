"""The one parser class: no guessing at misspelled flags, YAML files, switches that can be switched
off again."""

import argparse
import difflib
import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from coati.utils.logging import get_logger

logger = get_logger(__name__)


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
        argv = self._in_full(sys.argv[1:] if args is None else args)
        parsed, unread = self.parse_known_args(self._from_file(argv) + argv, namespace)
        if unread:
            self.error(
                f"{' '.join(unread)}: a value without a flag before it; --help lists the flags"
            )
        return parsed

    def error(self, message: str) -> NoReturn:
        """One line instead of the usage text, from one process per machine."""
        if os.environ.get("LOCAL_RANK", "0") != "0":
            # The same line from every process would bury it. A launcher ends all processes with the
            # first that fails, so those that stay silent leave the speaking one the time to speak.
            time.sleep(1.0)
            raise SystemExit(2)
        self.exit(2, f"{self.prog}: error: {message}\n")

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

    def read_value(self, action: argparse.Action, words: list[str]) -> Any:
        """``words`` as the value of ``action``; raises argparse.ArgumentError."""
        return self._get_values(action, words)

    def nearest(self, name: str) -> str:
        """``"; the nearest known one is --x"``, or nothing when none is near."""
        plain = name.lower().replace("-", "_")
        spelled = {known.replace("-", "_"): known for known in self.names()}
        near = difflib.get_close_matches(plain, spelled, n=1, cutoff=0.5)
        return (
            f"; the nearest known one is {spelled[near[0]]}" if near else "; --help lists the flags"
        )

    def _in_full(self, argv: Iterable[str]) -> list[str]:
        words = list(argv)
        for position, word in enumerate(words):
            if word == "--":
                break
            if self._is_flag(word):
                name, equals, value = word.partition("=")
                words[position] = self._full_name(name) + equals + value
        return words

    def _is_flag(self, word: str) -> bool:
        # argparse's own rule: negative numbers and words with a space are values.
        return (
            len(word) > 1
            and word[0] == "-"
            and " " not in word
            and not self._negative_number_matcher.match(word)
        )

    def _full_name(self, name: str) -> str:
        if name in self._option_string_actions:
            return name
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
        self.error(f"unknown flag {name}{self.nearest(name)}")

    def _from_file(self, argv: list[str]) -> list[str]:
        probe = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        probe.add_argument("--config", nargs="?")
        path = probe.parse_known_args(argv)[0].config
        if path is None:
            return []
        from coati.cli.config import file_words

        try:
            return file_words(self, path)
        except ValueError as error:
            self.error(str(error))
