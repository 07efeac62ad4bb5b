"""The flags that say what a chat template is told, and what of a row is learned: of coati prepare
and of the training commands, which prepare raw rows."""

import argparse
import json
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from coati.cli.values import add_switch
from coati.dataset.chat.row_options import (
    EMPTY_THOUGHTS,
    LEARNED_TURNS,
    ROLES_PREFIX,
    THOUGHTS,
    check_learn,
)
from coati.dataset.rows.column_names import TARGETS, column_words, parse_columns


def json_object(text: str) -> str:
    """A JSON object, as text in one spelling."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"is no JSON ({error}), found {text!r:.80}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object {{...}}, found {text!r:.80}")
    return json.dumps(found, ensure_ascii=False, sort_keys=True)


def template_args(text: str | None) -> dict[str, Any] | None:
    """The value of ``--template_args``."""
    return json.loads(text) if text else None


def _learn(text: str) -> str:
    try:
        return check_learn(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


json_object.schema = {"type": "string"}  # type: ignore[attr-defined]
_learn.schema = {"type": "string"}  # type: ignore[attr-defined]


def add_row_flags(group: argparse._ActionsContainer) -> None:
    """``--template_args``, and what becomes of thoughts."""
    _add(
        group,
        "--template_args",
        json_object,
        "JSON",
        "further variables of the chat template, such as '{\"enable_thinking\": false}'; kept with "
        "the rows and the model, and used wherever it responds",
    )
    group.add_argument(
        "--thoughts",
        choices=THOUGHTS,
        default=THOUGHTS[0],
        help="raw rows with thoughts (<think>, reasoning_content): template: those that the chat "
        "template writes, the others are counted; keep: where it drops one, write it before the "
        "response; drop: none; refuse: leave out rows whose thoughts it drops; last: keep that of "
        "the last response alone",
    )
    group.add_argument(
        "--empty_thoughts",
        choices=EMPTY_THOUGHTS,
        default=EMPTY_THOUGHTS[0],
        help="the empty thought that some templates write before a response without one: learned "
        "or not",
    )


def add_learn_flag(group: argparse._ActionsContainer) -> None:
    """``--learn``."""
    _add(
        group,
        "--learn",
        _learn,
        f"{'|'.join(LEARNED_TURNS)}|{ROLES_PREFIX}ROLE,...",
        "which turns of raw conversations are learned: all of the assistant, its last, or those of "
        "some roles (system, user, assistant, tool)",
        LEARNED_TURNS[0],
    )


def add_column_flags(group: argparse._ActionsContainer, rows: str = "") -> None:
    """``--columns`` and ``--strict_columns``. ``rows``: which ones they are for."""
    group.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="NAME=COLUMN",
        help=f"{rows}which column is what, for names that are not known: prompt=question,"
        f"response=answer (names: {', '.join(TARGETS)}); a dotted path reads inside a column; "
        "COLUMN= is not read",
    )
    add_switch(
        group,
        "--strict_columns",
        help=f"{rows}stop where a column or field with content is not read, instead of a warning",
    )


def check_columns(args: Namespace) -> None:
    """Bring ``args.columns`` into one spelling. Raises ValueError for what names no column."""
    try:
        args.columns = column_words(parse_columns(args.columns))
    except ValueError as error:
        raise ValueError(f"--columns: {error}") from error


def _add(
    group: argparse._ActionsContainer,
    name: str,
    read: Callable[[str], str],
    unit: str,
    help: str,
    default: str | None = None,
) -> None:
    group.add_argument(name, type=read, default=default, metavar=unit, help=help)
