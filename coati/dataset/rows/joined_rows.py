"""Files whose rows are parts of one: single messages, whose parents are other rows (Open
Assistant's flat table), and rated responses to one prompt (HelpSteer). The parts are put together
in whatever order they stand; other rows of such a file stay as they are.

Rows wait in a temporary file meanwhile: memory holds some 80 bytes of each.
"""

import hashlib
import math
import pickle
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from coati.dataset.rows.column_names import Layout
from coati.dataset.rows.message_trees import is_single_message
from coati.dataset.rows.readers import Rows, decode, kind_of, read_rows
from coati.dataset.rows.row_errors import RowError
from coati.dataset.rows.source_row import (
    RATING,
    PartRow,
    judgment,
    rating_of,
    truth_of,
    whole_number,
)
from coati.utils.logging import get_logger

logger = get_logger(__name__)

LOOKED_AT = 20  # rows that say what a file is
DEEPEST = 100  # turns of a conversation
# Columns that belong to the question: ratings of one prompt under two of them are two.
ASKED = ("prompt", "system", "system_prompt", "system_message", "history", "tools", "context")


@dataclass(frozen=True)
class Parts:
    """``is_part`` says which rows are; ``keys`` are two hashes of one, its own and its parent's (0:
    none); ``join`` puts the parts of one row together, with their lines, in the order of the file.
    ``needs``: columns; ``what``: they are, for people to read."""

    what: str
    needs: frozenset[str]
    is_part: Callable[[Any], bool]
    keys: Callable[[dict], tuple[int, int]]
    join: Callable[[list[tuple[int, dict]]], Iterator[tuple[int, Any]]]


def whole_rows(path: Path, documents: str | None = None, layout: Layout | None = None) -> Rows:
    """:func:`~coati.dataset.rows.readers.read_rows`, parts put together; a row stands on the line
    of its first part. ``documents``: nothing is. ``layout``: with names for the columns nothing is;
    columns that are not to be read are left out of parts.

    Raises OSError where there is no room for a temporary file.
    """
    parts = None if documents is not None else parts_of(path, layout)
    if parts is None:
        return read_rows(path, documents)
    logger.warning_once(f"{path}: {parts.what}")
    return joined(read_rows(path), layout)


def parts_of(path: Path, layout: Layout | None = None) -> Parts | None:
    """What the rows of the file are parts of, by the first of them."""
    if _named(layout) or kind_of(path) in (None, ".txt"):
        return None
    if kind_of(path) == ".parquet" and not _may_be(path):
        return None
    return _kind([row for _, row in islice(read_rows(path), LOOKED_AT)], _hidden(layout))


def joined(rows: Rows, layout: Layout | None = None) -> Rows:
    """``rows`` with those that are parts of one put together."""
    if _named(layout):
        yield from rows
        return
    first = list(islice(rows, LOOKED_AT))
    hidden = _hidden(layout)
    parts = _kind([row for _, row in first], hidden)
    rows = chain(first, rows)
    yield from rows if parts is None else _put_together(rows, parts, hidden)


def _named(layout: Layout | None) -> bool:
    return layout is not None and (bool(layout.tags) or any(layout.columns.values()))


def _hidden(layout: Layout | None) -> set[str]:
    return set() if layout is None else {name for name, of in layout.columns.items() if not of}


def _may_be(path: Path) -> bool:
    """By the columns of a parquet file."""
    import pyarrow
    from pyarrow import parquet

    try:
        names = set(parquet.read_schema(path).names)
    except pyarrow.ArrowException:
        return False  # which its reader explains
    return any(parts.needs <= names for parts in KINDS)


def _kind(first: Sequence[Any], hidden: set[str]) -> Parts | None:
    found = [row for row in map(_decoded, first) if isinstance(row, dict)]
    found = [_without(row, hidden) for row in found]
    for parts in KINDS:
        if any(map(parts.is_part, found)):
            return parts
    return None


def _decoded(raw: Any) -> Any:
    try:
        return decode(raw)
    except RowError:
        return None


def _without(row: dict, hidden: set[str]) -> dict:
    return {key: value for key, value in row.items() if key not in hidden} if hidden else row


def _put_together(rows: Rows, parts: Parts, hidden: set[str]) -> Rows:
    own = array("Q")
    parents = array("Q")
    starts = array("Q", [0])
    with tempfile.TemporaryFile(prefix="coati-rows-") as waiting:
        for number, (line, raw) in enumerate(rows):
            row = _decoded(raw)
            part = isinstance(row, dict) and parts.is_part(row := _without(row, hidden))
            mine, parent = parts.keys(row) if part else (2 * number + 1, 0)
            own.append(mine)
            parents.append(parent)
            written = waiting.write(pickle.dumps((line, part, row if part else raw)))
            starts.append(starts[-1] + written)
        for numbers in _groups(np.asarray(own), np.asarray(parents)):
            found = []
            for number in numbers:
                waiting.seek(starts[number])
                found.append(pickle.loads(waiting.read(starts[number + 1] - starts[number])))
            if found[0][1]:
                yield from parts.join([(line, row) for line, _, row in found])
            else:
                yield from ((line, raw) for line, _, raw in found)


def _groups(own: np.ndarray, parents: np.ndarray) -> Iterator[list[int]]:
    """Numbers of the rows that belong together, the groups in the order of their first rows. A row
    belongs to its parent's group; where that is not there, to that of the first row with its own
    key."""
    order = np.argsort(own, kind="stable")
    keys = own[order]
    first = order[np.searchsorted(keys, own)]
    places = np.minimum(np.searchsorted(keys, parents), len(own) - 1)
    child = (parents != 0) & (keys[places] == parents) & (first == np.arange(len(own)))
    root = np.where(child, order[places], first)
    for _ in range(len(own).bit_length()):  # each doubles the way that is gone
        root = root[root]
    circles = np.flatnonzero(child[root])  # those that never come to a beginning
    root[circles] = circles[:1]
    rows = np.argsort(root, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(root[rows])) + 1, len(own))
    starts = np.append(0, ends[:-1])
    for group in np.argsort(rows[starts]) if len(own) else ():
        yield rows[starts[group] : ends[group]].tolist()


def _hash(value: str) -> int:
    """An even number, not 0: rows that are no parts have odd ones."""
    found = hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(found, "little") & ~1 or 2


def _is_message(row: Any) -> bool:
    return is_single_message(row) and isinstance(row["text"], str)


def _parent(row: dict) -> str | None:
    found = row["parent_id"]
    absent = found is None or found == "" or (isinstance(found, float) and math.isnan(found))
    return None if absent else str(found)


def _message_keys(row: dict) -> tuple[int, int]:
    parent = _parent(row)
    return _hash(str(row["message_id"])), 0 if parent is None else _hash(parent)


def _tree(parts: list[tuple[int, dict]]) -> Iterator[tuple[int, Any]]:
    """The tree of some messages, or what is wrong with it."""
    nodes: dict[str, PartRow] = {}
    for line, row in parts:
        name = str(row["message_id"])
        if name in nodes:
            yield line, RowError("bad_tree", f"the message_id {name} stands in two rows")
        else:
            nodes[name] = PartRow(row, replies=[], **_typed(row))
    line = parts[0][0]
    root = next((node for node in nodes.values() if _parent(node) is None), None)
    if root is None:
        away = next((node for node in nodes.values() if _parent(node) not in nodes), None)
        why = "is in no other row" if away else "leads back to it"
        lost = away or next(iter(nodes.values()))
        yield (
            line,
            RowError(
                "bad_tree",
                f"the parent_id {_parent(lost)} of the message {lost['message_id']} {why}: "
                f"{len(nodes)} messages have no beginning",
            ),
        )
        return
    for node in nodes.values():
        if (parent := _parent(node)) is not None:
            nodes[parent]["replies"].append(node)
    if _depth(root) > DEEPEST:
        yield line, RowError("bad_tree", f"a conversation of more than {DEEPEST} messages")
        return
    yield line, {"prompt": root}


def _typed(row: dict) -> dict[str, Any]:
    """Numbers and switches as csv files and tables with gaps hold them."""
    typed: dict[str, Any] = {}
    if "rank" in row:
        typed["rank"] = whole_number(row["rank"])
    for name in ("deleted", "review_result"):
        if name in row:
            typed[name] = truth_of(row[name])
    return typed


def _depth(root: PartRow) -> int:
    depth = 0
    level = [root]
    while level and depth <= DEEPEST:
        depth += 1
        level = [reply for node in level for reply in node["replies"]]
    return depth


def _is_rated(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and row.get("prompt") is not None
        and row.get("response") is not None
        and rating_of(row) is not None
        and judgment(row) is None
    )


def _rated_keys(row: dict) -> tuple[int, int]:
    return _hash(repr([row.get(name) for name in ASKED])), 0


def _rated(parts: list[tuple[int, dict]]) -> Iterator[tuple[int, Any]]:
    """The responses to one prompt, beside what they have in common."""
    rows = [row for _, row in parts]
    own = ("response", RATING)
    shared = {
        name: value
        for name, value in rows[0].items()
        if name not in own and all(name in row and row[name] == value for row in rows)
    }
    responses = [
        PartRow({name: value for name, value in row.items() if name not in shared}) for row in rows
    ]
    yield parts[0][0], {**shared, "responses": responses}


KINDS = (
    Parts(
        "each row is a message; those of a conversation are read together, as a tree",
        frozenset(("message_id", "parent_id", "text", "role")),
        _is_message,
        _message_keys,
        _tree,
    ),
    Parts(
        f"each row is a response with its {RATING}; those to one prompt are read together",
        frozenset(("prompt", "response", RATING)),
        _is_rated,
        _rated_keys,
        _rated,
    ),
)
