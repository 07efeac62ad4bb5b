"""Names of columns that the built-in formats do not know: ``--columns prompt=question,...`` and the
entries of a ``dataset_info.json``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from coati.dataset.rows.column_use import ColumnUse, holds
from coati.dataset.rows.embedded_text import decoded
from coati.dataset.rows.row_errors import RowError

# What a column may be named to be; those that decide the format must be in every row.
DECIDING = (
    "messages",
    "prompt",
    "response",
    "chosen",
    "rejected",
    "label",
    "source",
    "target",
    "instruction",
    "output",
    "text",
)
BESIDE = (
    "system",
    "history",
    "input",
    "context",
    "choices",
    "tools",
    "reasoning",
    "gt_answer",
    "test_cases",
    "category",
    "margin",
    "score",
    "chosen_score",
    "rejected_score",
    "weight",
)
TARGETS = DECIDING + BESIDE
MEDIA = ("images", "videos", "audios")  # named to be warned of
# Read under their own names beside named columns, too.
KEPT = (
    "system",
    "system_prompt",
    "history",
    "tools",
    "gt_answer",
    "test_cases",
    "category",
    "margin",
    "weight",
    "label",
    "kto_tag",
    "score",
    "reward",
)
MESSAGE_KEYS = {"role_tag": "role", "content_tag": "content", "tool_calls_tag": "tool_calls"}
ROLE_TAGS = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function_call",
    "system_tag": "system",
}


@dataclass(frozen=True)
class Layout:
    """What the columns of some rows are. ``columns``: the column, perhaps a dotted path, of each
    target; an empty one is not to be read, and may be a path as the report has it
    (``messages[].images``). ``tags``: LLaMA-Factory's names inside messages."""

    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.columns or self.tags)

    @cached_property
    def hidden(self) -> frozenset[str]:
        """What is not to be read."""
        return frozenset(target for target, column in self.columns.items() if not column)

    def described(self) -> dict[str, Any]:
        return {"columns": dict(self.columns), "tags": dict(self.tags)}


def column_words(columns: Mapping[str, str]) -> list[str]:
    """``columns`` as :func:`parse_columns` reads them, in one order."""
    return [f"{target}={columns[target]}" for target in sorted(columns)]


def parse_columns(words: Sequence[str]) -> dict[str, str]:
    """``TARGET=COLUMN`` of each word, which may hold several, separated by commas. Raises
    ValueError for a target that does not exist or is named twice."""
    found: dict[str, str] = {}
    for word in (part for whole in words for part in whole.split(",") if part):
        target, equals, column = word.partition("=")
        if not equals:
            raise ValueError(f"{word!r}: expected NAME=COLUMN, as in prompt=question")
        if target not in TARGETS and column:
            raise ValueError(
                f"{target!r} is nothing that a column can be; expected one of {', '.join(TARGETS)}"
            )
        if target in found:
            raise ValueError(f"{target} is named twice")
        found[target] = column
    return found


def renamed(row: dict, layout: Layout) -> tuple[dict, dict[str, str], ColumnUse]:
    """``(row, names, use)``: the row under the names that the formats know, as which column of the
    file each is there, and what is not read. Raises RowError for a column that is not there."""
    hidden = layout.hidden
    use = ColumnUse(hidden)
    columns = {target: column for target, column in layout.columns.items() if column}
    if not columns:  # only names that are not to be read
        made = {key: value for key, value in row.items() if key not in hidden}
        return _retagged(made, layout), {}, use
    made: dict[str, Any] = {}
    paths: set[str] = set()
    for target, column in columns.items():
        value = _value(row, column)
        if value is None and target in DECIDING:
            found = ", ".join(map(str, row)) or "no key"
            raise RowError("wrong_keys", f"{target}={column}: no column {column}; found {found}")
        paths.add(column)
        if value is not None:
            made[target] = value
    for key, value in row.items():
        if key in paths or key in hidden:
            continue
        inner = {path[len(key) + 1 :] for path in paths if path.startswith(f"{key}.")}
        if inner:
            _leave_siblings(use, key, value, inner)
        elif key in KEPT and key not in made:
            made[key] = value
        else:
            use.leave(key, value)
    names = {target: column for target, column in columns.items() if target not in MEDIA}
    return _retagged(made, layout), names, use


def _value(row: Any, path: str) -> Any:
    """What stands at a dotted path; a key with dots in it comes before the path."""
    if isinstance(row, str):
        row = decoded(row)
    if isinstance(row, dict):
        if path in row:
            return row[path]
        for end in (place for place, letter in enumerate(path) if letter == "."):
            if path[:end] in row:
                return _value(row[path[:end]], path[end + 1 :])
        return None
    head, _, rest = path.partition(".")
    if isinstance(row, list) and head.lstrip("-").isdigit() and -len(row) <= int(head) < len(row):
        return _value(row[int(head)], rest) if rest else row[int(head)]
    return None


def _leave_siblings(use: ColumnUse, path: str, value: Any, read: set[str]) -> None:
    """What stands beside the parts of ``value`` that are read."""
    if isinstance(value, str):
        value = decoded(value)
    items = enumerate(value) if isinstance(value, list) else (value or {}).items()
    for key, one in items:
        inner = {part.partition(".")[2] for part in read if part.partition(".")[0] == str(key)}
        if inner and "" not in inner:
            _leave_siblings(use, f"{path}.{key}", one, inner)
        elif not inner and holds(one):
            use.leave(f"{path}.{key}", one)


def _retagged(row: dict, layout: Layout) -> dict:
    """The messages of ``row`` under the usual keys and roles."""
    tags = layout.tags
    if not tags:
        return row
    keys = {tags[tag]: key for tag, key in MESSAGE_KEYS.items() if tag in tags}
    keys = {"from": "role", "value": "content"} | keys if "role_tag" not in tags else keys
    roles = {tags[tag]: role for tag, role in ROLE_TAGS.items() if tag in tags}
    lists = ("messages", "conversations", "chosen", "rejected")
    return {
        key: _retagged_value(value, keys, roles) if key in lists else value
        for key, value in row.items()
    }


def _retagged_value(value: Any, keys: dict[str, str], roles: dict[str, str]) -> Any:
    if isinstance(value, str):
        value = decoded(value) if value.lstrip().startswith(("[", "{")) else value
    if isinstance(value, list):
        return [_retagged_value(one, keys, roles) for one in value]
    if not isinstance(value, dict):
        return value
    made: dict[str, Any] = {}
    for key, one in value.items():
        name = keys.get(key, key)
        made[key if name in made else name] = one
    role = made.get("role")
    if isinstance(role, str):
        made["role"] = roles.get(role, role)
    return made
