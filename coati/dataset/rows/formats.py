"""Which format a row has, and whether the row can be used for a type; :data:`DATASET_FORMATS` is
the table of formats.

A format is one entry: its name, what its rows hold, how they are recognized and read. The first
entry that fits a row wins, so the ones with more keys come first.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property, lru_cache
from typing import Any

from coati.dataset.data_types import DATA_TYPES
from coati.dataset.rows import source_row as read
from coati.dataset.rows.messages import is_message_list, text
from coati.dataset.rows.row_errors import RowError
from coati.dataset.rows.source_row import SourceRow


@dataclass(frozen=True)
class DatasetFormat:
    """``holds`` is one of :data:`CONTENTS`; ``keys`` are what a row must have, for people to read;
    ``read`` fills a SourceRow, unchecked as to turns."""

    name: str
    holds: str
    keys: tuple[str, ...]
    matches: Callable[[Any], bool]
    read: Callable[[Any], SourceRow]

    @cached_property
    def types(self) -> tuple[str, ...]:
        """The data types that can be made of it, the most particular one first."""
        reading = [type for type in DATA_TYPES.values() if self.holds in type.reads]
        return tuple(type.name for type in sorted(reading, key=lambda type: len(type.reads)))


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


def _is_text(row: Any) -> bool:
    """A text and nothing beside it that a conversation would be made of."""
    found = isinstance(row, dict) and isinstance(row.get("text"), str)
    return found and not any(row.get(key) is not None for key in _NOT_BESIDE_TEXT)


def _is_document(row: Any) -> bool:
    return isinstance(row, str) or read.text_column(row) is not None


def _is_asked_pair(row: Any) -> bool:
    return _has(*_PAIR)(row) and read.first_question(row) not in (None, "text")


def _is_talk(row: Any) -> bool:
    # With two responses after it, it is the context of a preference.
    return _has(_TALK)(row) and not _has(*_PAIR)(row)


def _is_unjudged_round(row: Any) -> bool:
    # With a label the response may be a bad one, which supervised training must not learn.
    return _has("prompt", "completion")(row) and row.get("label") is None


def _is_openai(row: Any) -> bool:
    found = row.get("messages") if isinstance(row, dict) else None
    return isinstance(found, list) and any(
        isinstance(m, dict) and m.get("role") is not None for m in found
    )


_PAIR = ("chosen", "rejected")
_JUDGED = ("prompt", "completion", "label")
_ROUND = ("prompt", "completion")
_TALK = "conversations"
_NOT_BESIDE_TEXT = (
    *("messages", _TALK, "instruction", "completion", "label", *_PAIR),
    *(key for key in read.QUESTIONS if key != "text"),
)
_RM_STATIC = _has("response", prompt=str, chosen=str, rejected=str)
# What rows of a format hold; each data type says which of these it reads.
CONTENTS = ("pair", "judged", "conversation", "prompt", "text", "document")
PAIR, JUDGED, CHAT, ASKED, TEXT, DOCUMENT = CONTENTS
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
    DatasetFormat("openai", CHAT, ("messages",), _is_openai, read.listed("messages")),
    DatasetFormat("messages", CHAT, ("messages",), _has("messages"), read.listed("messages")),
    DatasetFormat("message_list", CHAT, (), is_message_list, read.message_rows),
    DatasetFormat("sharegpt", CHAT, (_TALK,), _is_talk, read.listed(_TALK)),
    DatasetFormat(
        "alpaca", CHAT, ("instruction", "output"), _has("instruction", "output"), read.alpaca
    ),
    DatasetFormat("alpaca", ASKED, ("instruction",), _has("instruction"), read.alpaca),
    DatasetFormat(
        "source_target", TEXT, ("source", "Target"), _is_source_target, read.source_target
    ),
    DatasetFormat("text", TEXT, ("text",), _is_text, read.plain_text),
    DatasetFormat("trl", CHAT, _ROUND, _is_unjudged_round, read.prompt_and_completion),
    DatasetFormat("trl", ASKED, ("prompt",), _has(prompt=list), read.plain),
    DatasetFormat("plain", ASKED, ("prompt",), _is_plain, read.plain),
    DatasetFormat("document", DOCUMENT, ("text",), _is_document, read.document),
)
EXTRAS = ("category", "gt_answer", "test_cases", "margin")
FORMATS = tuple(dict.fromkeys(format.name for format in DATASET_FORMATS))
FORMATS_OF = {
    type: tuple(dict.fromkeys(format.name for format in DATASET_FORMATS if type in format.types))
    for type in DATA_TYPES
}


def read_row(type: str, row: Any, format: str | None = None) -> SourceRow:
    """``row`` (decoded JSON, or a line of text) as data of ``type``, its format recognized or
    given by name.

    Raises RowError: wrong_type when it has a format of another type, wrong_keys with the nearest
    format when it has none.
    """
    found_format = _recognize(type, row, format)
    found = found_format.read(row)
    found.format = found_format.name
    if isinstance(row, dict):
        _add_extras(found, row)
    DATA_TYPES[type].finish(found)
    return found


@lru_cache
def _candidates(type: str, name: str | None) -> tuple[DatasetFormat, ...]:
    return tuple(
        format for format in DATASET_FORMATS if type in format.types and name in (None, format.name)
    )


@lru_cache(maxsize=1024)
def _within_reach(type: str, name: str | None, keys: tuple[str, ...]) -> tuple[DatasetFormat, ...]:
    """The candidates that a row with these keys may have; most rows of a file have the same
    keys."""
    return tuple(
        format
        for format in _candidates(type, name)
        if getattr(format.matches, "needs", set()) <= set(keys)
    )


def _recognize(type: str, row: Any, name: str | None) -> DatasetFormat:
    for format in _within_reach(type, name, tuple(row) if isinstance(row, dict) else ()):
        if format.matches(row):
            return format
    candidates = _candidates(type, name)
    other = next((format for format in DATASET_FORMATS if format.matches(row)), None)
    if other is None or name is not None:
        raise RowError("wrong_keys", _expected(candidates, row, name))
    same = next((format for format in candidates if format.name == other.name), None)
    needed = f", for which they need {', '.join(same.keys)}" if same else ""
    raise RowError(
        "wrong_type",
        f"found {_found(row)}: {other.name} rows, for --type {' or '.join(other.types)}, not "
        f"{type}{needed}",
    )


def _expected(candidates: Sequence[DatasetFormat], row: Any, name: str | None) -> str:
    keys = " / ".join(
        dict.fromkeys(", ".join(format.keys) or "a list of messages" for format in candidates)
    )
    expected = f"expected {keys}{f' (--format {name})' if name else ''}, found {_found(row)}"
    near = max(DATASET_FORMATS, key=lambda format: _nearness(format, row))
    if _nearness(near, row) == 0:
        return expected + _hidden_rows(row)
    lacking = [key for key in near.keys if row.get(key) is None]
    need = f", which needs {' and '.join(lacking)}" if lacking else ""
    return (
        f"{expected}; nearest is {near.name} ({', '.join(near.keys)}) of --type "
        f"{' or '.join(near.types)}{need}"
    )


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


def _nearness(format: DatasetFormat, row: Any) -> float:
    """Share of the format's keys that the row has, spelled alike at least."""
    if not isinstance(row, dict) or not format.keys:
        return 0.0
    found = [str(key) for key in row]
    best = [
        max((SequenceMatcher(None, key, one).ratio() for one in found), default=0.0)
        for key in format.keys
    ]
    return sum(ratio for ratio in best if ratio > 0.75) / len(best)


def _add_extras(found: SourceRow, row: dict) -> None:
    """The columns that any format may have."""
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
