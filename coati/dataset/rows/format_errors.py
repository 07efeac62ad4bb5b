"""What is said of a row that has no format of its type: what was found, what the nearest format
would need, and what to do."""

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

from coati.dataset.rows.message_trees import is_single_message
from coati.dataset.rows.messages import is_message_list
from coati.dataset.rows.row_errors import RowError
from coati.dataset.rows.source_row import RATING, judgment

if TYPE_CHECKING:
    from coati.dataset.rows.formats import DatasetFormat

# What --columns has to name for each type.
NAMING = {
    "sft": "prompt=NAME,response=NAME",
    "preference": "prompt=NAME,chosen=NAME,rejected=NAME",
    "prompt": "prompt=NAME",
    "kto": "prompt=NAME,response=NAME,label=NAME",
    "text": "text=NAME",
    "scored": "prompt=NAME,response=NAME,score=NAME",
}


def wrong_row(
    type: str,
    row: Any,
    name: str | None,
    candidates: Sequence["DatasetFormat"],
    other: "DatasetFormat | None",
    formats: Sequence["DatasetFormat"],
) -> RowError:
    """The error for ``row``, which has none of the ``candidates`` but perhaps the ``other``
    format."""
    if is_single_message(row):
        return RowError(
            "wrong_keys",
            f"found {_found(row)}: a table of single messages, whose parents are other rows; use "
            "the file that holds each tree in one row (.trees.jsonl.gz)",
        )
    if other is None or name is not None:
        return RowError("wrong_keys", _expected(type, candidates, row, name, formats))
    if type == "kto" and isinstance(row, dict) and row.get("label") is not None:
        return RowError("bad_label", f"label is {row['label']!r:.60}, expected true or false")
    same = next((format for format in candidates if format.name == other.name), None)
    lacks = same is not None and any(row.get(key) is None for key in same.keys)
    needed = f", for which they need {', '.join(same.keys)}" if lacks else ""
    return RowError(
        "wrong_type",
        f"found {_found(row)}: {other.name} rows, for --type {' or '.join(other.suggested)}, not "
        f"{type}{needed}{_remedy(type, row, other)}",
    )


def _remedy(type: str, row: Any, other: "DatasetFormat") -> str:
    if type == "sft" and other.holds == "judged" and (key := judgment(row)):
        return (
            f"; a response judged bad must not be learned: if {key} is no judgment, prepare with "
            f"--columns {key}="
        )
    if type == "sft" and isinstance(row, dict) and isinstance(row.get("text"), str):
        return "; to learn the text whole, without a template, prepare with --columns target=text"
    if type == "preference" and isinstance(row, dict) and RATING in row:
        return "; pairs of HelpSteer2 are in its preference/ folder"
    if type == "kto" and other.name == "helpsteer":
        return "; a rating is no label: add a column label, true for what you count as good"
    return ""


def _expected(
    type: str,
    candidates: Sequence["DatasetFormat"],
    row: Any,
    name: str | None,
    formats: Sequence["DatasetFormat"],
) -> str:
    keys = " / ".join(
        dict.fromkeys(", ".join(format.keys) or "a list of messages" for format in candidates)
    )
    expected = f"expected {keys}{f' (--format {name})' if name else ''}, found {_found(row)}"
    near = max(formats, key=lambda format: _nearness(format, row))
    if _nearness(near, row) == 0:
        return expected + (_hidden_rows(row) or _naming(type, row, name))
    lacking = [key for key in near.keys if row.get(key) is None]
    need = f", which needs {' and '.join(lacking)}" if lacking else ""
    return (
        f"{expected}; nearest is {near.name} ({', '.join(near.keys)}) of --type "
        f"{' or '.join(near.suggested)}{need}{_naming(type, row, name)}"
    )


def _naming(type: str, row: Any, name: str | None) -> str:
    """How to name columns, where there are some."""
    if not isinstance(row, dict) or not row or name is not None:
        return ""
    return f"; or say which columns they are: --columns {NAMING[type]}"


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


def _nearness(format: "DatasetFormat", row: Any) -> float:
    """Share of the format's keys that the row has, spelled alike at least."""
    if not isinstance(row, dict) or not format.keys:
        return 0.0
    found = [str(key) for key in row]
    best = [
        max((SequenceMatcher(None, key, one).ratio() for one in found), default=0.0)
        for key in format.keys
    ]
    return sum(ratio for ratio in best if ratio > 0.75) / len(best)
