"""Rows of every accepted file and shape, each with the file and line it stands on.

A new data type is one function from a row to a :class:`SourceRow` and one entry in :data:`READERS`.
"""

import gzip
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coati.dataset.reasons import ROLES, RowError
from coati.utils.notice import say_once

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
Messages = list[dict[str, str]]


@dataclass
class SourceRow:
    """One row in the library's own form: messages of {role, content}, roles system, user, assistant."""

    messages: Messages
    category: str | None = None


def find_files(paths: Sequence[str | os.PathLike]) -> list[Path]:
    """The data files behind ``paths``: files as given, folders searched in all depths, in sorted order.

    Raises ValueError for a path that is not there, a folder without data files or a file of another kind.
    """
    files = [file for path in paths for file in _files_of(Path(path))]
    if not files:
        raise ValueError("no input: name at least one file or folder of data")
    return files


def _files_of(path: Path) -> list[Path]:
    known = ", ".join(SUFFIXES)
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise ValueError(f"{path}: unknown kind of data file; expected one of {known}")
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such file or folder; expected data files ({known})")
    inside = [p for p in sorted(path.rglob("*")) if p.is_file() and not p.name.startswith(".")]
    files = [p for p in inside if p.name.endswith(SUFFIXES)]
    if not files:
        held = ", ".join(p.name for p in inside[:5]) or "nothing"
        raise ValueError(f"{path}: the folder holds no data file (expected {known}; found {held})")
    if ignored := [str(p.relative_to(path)) for p in inside if p not in files]:
        say_once(f"{path}: ignored {', '.join(ignored[:5])}{' ...' if len(ignored) > 5 else ''} (not {known})")
    return files


def read_rows(file: Path) -> Iterator[tuple[int, Any]]:
    """``(line, row)`` of one file; a row is the undecoded line (bytes), a decoded object or a RowError.

    In a parquet file the line is the number of the row, from 1.
    """
    if file.name.endswith(".parquet"):
        yield from _read_parquet(file)
    elif _is_array(file):
        yield from _read_array(file)
    else:
        with _open(file) as lines:
            yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip(b" \t\r\n\xef\xbb\xbf"))


def _open(file: Path):
    return gzip.open(file, "rb") if file.name.endswith(".gz") else open(file, "rb")


def _is_array(file: Path) -> bool:
    """One JSON array over the whole file, as against one object (or one list of messages) per line."""
    with _open(file) as lines:
        first = next((line for line in lines if line.strip(b" \t\r\n\xef\xbb\xbf")), b"").lstrip(b" \t\xef\xbb\xbf")
    if not first.startswith(b"["):
        return False
    try:
        row = json.loads(first)
    except json.JSONDecodeError:
        return True
    return not _is_message_list(row)


def _is_message_list(row: Any) -> bool:
    return (
        isinstance(row, list) and bool(row) and all(isinstance(m, dict) and ("role" in m or "from" in m) for m in row)
    )


def _read_array(file: Path) -> Iterator[tuple[int, Any]]:
    with _open(file) as stream:
        text = stream.read().decode("utf-8-sig", errors="replace")
    decoder, position, line, counted = json.JSONDecoder(), text.index("[") + 1, 1, 0
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        line, counted = line + text.count("\n", counted, position), position
        if text.startswith("]", position):
            return
        try:
            row, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            # Where the next element would begin cannot be told, so the rest of the array is one bad row.
            yield (
                error.lineno,
                RowError("bad_json", f"{error.msg} at column {error.colno}; the array is not read further"),
            )
            return
        yield line, row


def _read_parquet(file: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        batches = parquet.ParquetFile(file).iter_batches(batch_size=1000)
        number = 0
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file}: not a readable parquet file ({str(error).splitlines()[0]})") from error


def decode(row: Any) -> Any:
    """The object of what :func:`read_rows` yields. Raises RowError for a line that is not JSON."""
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, bytes):
        return row
    try:
        return json.loads(row.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise RowError("bad_json", f"{error.msg} at column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise RowError("bad_json", f"not UTF-8 text (byte {error.start})") from error


def read_sft(row: Any) -> SourceRow:
    """A supervised conversation in any of :data:`SFT_SHAPES`. Raises RowError naming what is wrong with it."""
    if _is_message_list(row):
        row = {"messages": row}
    if not isinstance(row, dict):
        raise RowError("wrong_keys", f"expected an object with {SHAPE_KEYS}, found {type(row).__name__}")
    for key, messages_of in SFT_SHAPES.items():
        if row.get(key) is not None:
            category = row.get("category")
            return SourceRow(alternating(messages_of(row)), None if category is None else str(category))
    raise RowError("wrong_keys", f"expected {SHAPE_KEYS}, found {', '.join(map(str, row)) or 'no key'}")


def _list_of_messages(key: str) -> Callable[[dict], Messages]:
    def messages_of(row: dict) -> Messages:
        found = row[key]
        if not isinstance(found, list):
            raise RowError("wrong_keys", f"{key} must be a list of messages, found {type(found).__name__}")
        return [_message(message, index) for index, message in enumerate(found)]

    return messages_of


def _alpaca(row: dict) -> Messages:
    """Instruction, optional input and output: one round."""
    if "output" not in row:
        raise RowError("wrong_keys", f"an instruction needs an output, found {', '.join(map(str, row))}")
    parts = {name: _text(row.get(name) or "", name) for name in ("instruction", "input", "output")}
    question = "\n\n".join(part for part in (parts["instruction"], parts["input"]) if part)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": parts["output"]}]


SFT_SHAPES: dict[str, Callable[[dict], Messages]] = {
    "messages": _list_of_messages("messages"),
    "conversations": _list_of_messages("conversations"),
    "instruction": _alpaca,
}
SHAPE_KEYS = "messages, conversations or instruction/input/output"
READERS: dict[str, Callable[[Any], SourceRow]] = {"sft": read_sft}


def _message(message: Any, index: int) -> dict[str, str]:
    if not isinstance(message, dict):
        raise RowError("wrong_keys", f"message {index} must be an object, found {type(message).__name__}")
    role = message.get("role") if message.get("from") is None else message["from"]
    content = message.get("value") if message.get("content") is None else message["content"]
    if role is None or content is None:
        lacking = "from (or role)" if role is None else "content (or value)"
        raise RowError(
            "wrong_keys", f"message {index} lacks {lacking}, found {', '.join(map(str, message)) or 'no key'}"
        )
    known = ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        raise RowError("unknown_role", f"message {index} is from {role!r}; known roles: {', '.join(ROLES)}")
    return {"role": known, "content": _text(content, f"message {index}")}


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RowError("content_not_text", f"{where} holds {type(value).__name__} instead of a string")
    return value


def alternating(messages: Messages) -> Messages:
    """``messages`` when user and assistant take turns after an optional system message; a last question is left out."""
    if not messages:
        raise RowError("empty_conversation", "the list of messages is empty")
    first = int(messages[0]["role"] == "system")
    for index, message in enumerate(messages[first:]):
        wanted = ("user", "assistant")[index % 2]
        if message["role"] != wanted:
            raise RowError(
                "roles_not_alternating", f"message {index + first} is from {message['role']}, expected {wanted}"
            )
        if wanted == "assistant" and not message["content"].strip():
            raise RowError("empty_answer", f"message {index + first} is empty")
    turns = messages[: first + (len(messages) - first) // 2 * 2]
    if len(turns) == first:
        raise RowError("no_assistant_turn", f"found only {', '.join(m['role'] for m in messages)}")
    return turns
