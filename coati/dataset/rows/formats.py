"""Which shape a row has, and whether the row can be used for a type: :data:`DATASET_FORMATS` is the table of
all of them.

A shape is one entry: its name, the types it can be prepared as, how it is recognized and read. The
first entry that fits a row wins, so the ones with more keys come first.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache, partial
from typing import Any

from coati.dataset.rows import source_row as read
from coati.dataset.rows.messages import (
    complete_rounds,
    continuation,
    is_message_list,
    question,
    text,
    without_answer,
)
from coati.dataset.rows.row_errors import RowError
from coati.dataset.rows.source_row import SourceRow


@dataclass(frozen=True)
class DatasetFormat:
    """``keys`` are what a row must have, for people to read; ``read`` fills a SourceRow, unchecked
    as to turns."""

    name: str
    types: tuple[str, ...]
    keys: tuple[str, ...]
    matches: Callable[[Any], bool]
    read: Callable[[Any], SourceRow]


def _has(*keys: str, **kinds: type | tuple) -> Callable[[Any], bool]:
    """Whether a row has ``keys``, not null, those named in ``kinds`` being of that kind."""
    wanted = (*keys, *kinds)

    def matches(row: Any) -> bool:
        if not isinstance(row, dict):
            return False
        for key in wanted:  # a loop, since every row meets most of the table
            if row.get(key) is None:
                return False
        return all(isinstance(row[key], kind) for key, kind in kinds.items())

    matches.needs = frozenset(wanted)
    return matches


def _is_source_target(row: Any) -> bool:
    return isinstance(row, dict) and {"source", "target"} <= {str(key).lower() for key in row}


def _is_plain(row: Any) -> bool:
    return isinstance(row, str) or read.first_question(row) is not None


def _is_asked_pair(row: Any) -> bool:
    return _has(*_PAIR)(row) and read.first_question(row) not in (None, "text")


def _is_talk(row: Any) -> bool:
    # With two answers after it, it is the context of a preference.
    return _has(_TALK)(row) and not _has(*_PAIR)(row)


def _is_unjudged_round(row: Any) -> bool:
    # With a label the answer may be a bad one, which supervised training must not learn.
    return _has("prompt", "completion")(row) and row.get("label") is None


def _spoken(key: str, name: str) -> Callable[[Any], bool]:
    """A list of messages under ``key`` whose speakers stand under ``name``."""

    def matches(row: Any) -> bool:
        found = row.get(key) if isinstance(row, dict) else None
        return isinstance(found, list) and any(
            isinstance(m, dict) and m.get(name) is not None for m in found
        )

    return matches


_PAIR, _JUDGED, _ROUND = (
    ("chosen", "rejected"),
    ("prompt", "completion", "label"),
    ("prompt", "completion"),
)
PAIR, JUDGED, CHAT, ASKED = (
    ("preference", "prompt"),
    ("kto", "prompt"),
    ("sft", "prompt"),
    ("prompt",),
)
_TALK = "conversations"
_RM_STATIC = _has("response", prompt=str, chosen=str, rejected=str)
DATASET_FORMATS: tuple[DatasetFormat, ...] = (
    DatasetFormat(
        "preference",
        PAIR,
        ("context", *_PAIR),
        _has("context", *_PAIR),
        read.context_pair("context"),
    ),
    DatasetFormat("sharegpt", PAIR, (_TALK, *_PAIR), _has(_TALK, *_PAIR), read.context_pair(_TALK)),
    DatasetFormat(
        "alpaca", PAIR, ("instruction", *_PAIR), _has("instruction", *_PAIR), read.instruction_pair
    ),
    DatasetFormat("rm_static", PAIR, ("prompt", "response", *_PAIR), _RM_STATIC, read.prompt_pair),
    DatasetFormat("trl", PAIR, ("prompt", *_PAIR), _is_asked_pair, read.prompt_pair),
    DatasetFormat("trl", PAIR, _PAIR, _has(chosen=list, rejected=list), read.whole_pair),
    DatasetFormat("hh_rlhf", PAIR, _PAIR, _has(*_PAIR), read.whole_pair),
    DatasetFormat("kto", JUDGED, _JUDGED, _has("prompt", "label", completion=dict), read.judged),
    DatasetFormat("trl", JUDGED, _JUDGED, _has(*_JUDGED), read.judged),
    DatasetFormat(
        "rl_example", ASKED, ("messages", "gt_answer"), _has(messages=dict), read.rl_example
    ),
    DatasetFormat(
        "openai", CHAT, ("messages",), _spoken("messages", "role"), read.listed("messages")
    ),
    DatasetFormat("messages", CHAT, ("messages",), _has("messages"), read.listed("messages")),
    DatasetFormat("message_list", CHAT, (), is_message_list, read.message_rows),
    DatasetFormat("sharegpt", CHAT, (_TALK,), _is_talk, read.listed(_TALK)),
    DatasetFormat(
        "alpaca", CHAT, ("instruction", "output"), _has("instruction", "output"), read.alpaca
    ),
    DatasetFormat("alpaca", ASKED, ("instruction",), _has("instruction"), read.alpaca),
    DatasetFormat(
        "source_target", ("sft",), ("source", "Target"), _is_source_target, read.source_target
    ),
    DatasetFormat("trl", CHAT, _ROUND, _is_unjudged_round, read.prompt_and_completion),
    DatasetFormat("trl", ASKED, ("prompt",), _has(prompt=list), read.plain),
    DatasetFormat("plain", ASKED, ("prompt",), _is_plain, read.plain),
)
EXTRAS = ("category", "gt_answer", "test_cases", "margin")
FORMATS = tuple(dict.fromkeys(shape.name for shape in DATASET_FORMATS))
FORMATS_OF = {
    type: tuple(dict.fromkeys(shape.name for shape in DATASET_FORMATS if type in shape.types))
    for type in ("sft", "preference", "prompt", "kto")
}


def read_row(type: str, row: Any, format: str | None = None) -> SourceRow:
    """``row`` (decoded JSON, or a line of text) as data of ``type``, recognized by its shape or
    read as ``format``.

    Raises RowError: wrong_type when another type has this shape, wrong_keys with the nearest shape
    when none has.
    """
    shape = _recognize(type, row, format)
    found = shape.read(row)
    found.shape = shape.name
    if isinstance(row, dict):
        _add_extras(found, row)
    FINISH[type](found)
    return found


@lru_cache
def _candidates(type: str, format: str | None) -> tuple[DatasetFormat, ...]:
    return tuple(
        shape for shape in DATASET_FORMATS if type in shape.types and format in (None, shape.name)
    )


@lru_cache(maxsize=1024)
def _within_reach(
    type: str, format: str | None, keys: tuple[str, ...]
) -> tuple[DatasetFormat, ...]:
    """The candidates that a row with these keys may have; most rows of a file have the same
    keys."""
    return tuple(
        shape
        for shape in _candidates(type, format)
        if getattr(shape.matches, "needs", set()) <= set(keys)
    )


def _recognize(type: str, row: Any, format: str | None) -> DatasetFormat:
    for shape in _within_reach(type, format, tuple(row) if isinstance(row, dict) else ()):
        if shape.matches(row):
            return shape
    shapes = _candidates(type, format)
    other = next((shape for shape in DATASET_FORMATS if shape.matches(row)), None)
    if other is None or format is not None:
        raise RowError("wrong_keys", _expected(shapes, row, format))
    same = next((shape for shape in shapes if shape.name == other.name), None)
    needed = f", for which they need {', '.join(same.keys)}" if same else ""
    raise RowError(
        "wrong_type",
        f"found {_found(row)}: {other.name} rows, for --type {' or '.join(other.types)}, not "
        f"{type}{needed}",
    )


def _expected(shapes: Sequence[DatasetFormat], row: Any, format: str | None) -> str:
    forms = " / ".join(
        dict.fromkeys(", ".join(shape.keys) or "a list of messages" for shape in shapes)
    )
    said = f"expected {forms}{f' (--format {format})' if format else ''}, found {_found(row)}"
    near = max(DATASET_FORMATS, key=lambda shape: _nearness(shape, row))
    if _nearness(near, row) == 0:
        return said + _hidden_rows(row)
    lacking = [key for key in near.keys if row.get(key) is None]
    need = f", which needs {' and '.join(lacking)}" if lacking else ""
    return f"{said}; nearest is {near.name} ({', '.join(near.keys)}) of --type {' or '.join(near.types)}{need}"


def _hidden_rows(row: Any) -> str:
    """A file that is one object around the array of its rows."""
    values = row.items() if isinstance(row, dict) else ()
    key = next(
        (
            key
            for key, value in values
            if isinstance(value, list) and value and isinstance(value[0], dict)
        ),
        None,
    )
    return f"; {key} holds a list of rows: write that list alone into the file" if key else ""


def _found(row: Any) -> str:
    if not isinstance(row, dict):
        return (
            "a list of messages"
            if is_message_list(row)
            else {str: "a text"}.get(type(row), type(row).__name__)
        )
    return (
        ", ".join(f"{key}{'' if value is not None else ' (null)'}" for key, value in row.items())
        or "no key"
    )


def _nearness(shape: DatasetFormat, row: Any) -> float:
    """Share of the shape's keys that the row has, spelled alike at least."""
    if not isinstance(row, dict) or not shape.keys:
        return 0.0
    found = [str(key) for key in row]
    best = [
        max((SequenceMatcher(None, key, one).ratio() for one in found), default=0.0)
        for key in shape.keys
    ]
    return sum(ratio for ratio in best if ratio > 0.75) / len(best)


def _add_extras(found: SourceRow, row: dict) -> None:
    """The columns that any shape may have."""
    if row.get("system") and found.messages and found.messages[0]["role"] != "system":
        found.messages = [
            {"role": "system", "content": text(row["system"], "system")},
            *found.messages,
        ]
    given = {key: row[key] for key in EXTRAS if row.get(key) not in (None, "")}
    found.category = str(given["category"]) if "category" in given else None
    if "gt_answer" in given:
        if not isinstance(given["gt_answer"], str | int | float):
            raise RowError("bad_gt_answer", f"gt_answer is {given['gt_answer']!r:.60}")
        found.gt_answer = str(given["gt_answer"])
    elif "test_cases" in given:
        try:
            found.gt_answer = json.dumps(given["test_cases"], ensure_ascii=False)
        except TypeError as error:  # dates or bytes out of a parquet file
            raise RowError("bad_gt_answer", f"test_cases: {error}") from error
    if "margin" in given:
        try:
            found.margin = float(row["margin"])
        except (TypeError, ValueError):
            found.margin = math.nan
        if not math.isfinite(found.margin):
            raise RowError("bad_margin", f"margin is {row['margin']!r:.60}, expected a number")


def _finish_sft(row: SourceRow) -> None:
    if row.text is None:
        row.messages = complete_rounds(row.messages)
    elif not row.text.strip():
        raise RowError("empty_conversation", "source and Target hold no text")


def _finish_prompt(row: SourceRow) -> None:
    whole = len(row.messages)
    row.messages = without_answer(row.messages)
    row.unanswered = len(row.messages) < whole
    row.chosen, row.rejected, row.completion, row.label, row.margin = [], [], None, None, None


def _finish_preference(row: SourceRow) -> None:
    row.messages = question(row.messages)
    row.chosen, row.rejected = (
        continuation(row.chosen, "chosen"),
        continuation(row.rejected, "rejected"),
    )
    if row.chosen == row.rejected:
        raise RowError("same_answers", f"both are {row.chosen[-1]['content'][:60]!r}")


def _finish_kto(row: SourceRow) -> None:
    row.messages = question(row.messages)
    if not row.completion.strip():
        raise RowError("empty_answer", "completion is empty")


FINISH: dict[str, Callable[[SourceRow], None]] = {
    "sft": _finish_sft,
    "preference": _finish_preference,
    "prompt": _finish_prompt,
    "kto": _finish_kto,
}
READERS: dict[str, Callable[..., SourceRow]] = {type: partial(read_row, type) for type in FINISH}
