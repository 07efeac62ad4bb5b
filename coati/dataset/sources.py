"""Rows of every accepted kind of file, each with the file and line it stands on; shapes.py makes sense of them."""

import gzip
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from coati.dataset.json_array import array_elements
from coati.dataset.messages import is_message_list
from coati.dataset.reasons import RowError
from coati.dataset.shapes import READERS as READERS
from coati.dataset.shapes import SourceRow as SourceRow
from coati.utils.notice import say_once

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")


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
    with _open(file) as stream:
        if not stream.read(4096).lstrip(b" \t\r\n\xef\xbb\xbf").startswith(b"["):
            return False
    with _open(file) as stream:
        first = next((text for _, text in array_elements(stream)), None)
    try:
        return first is None or not is_message_list([json.loads(first)])
    except ValueError:
        return True


def _read_array(file: Path) -> Iterator[tuple[int, Any]]:
    with _open(file) as stream:
        for line, text in array_elements(stream):
            yield line, text or RowError("bad_json", "the brackets opened here are not closed; nothing further is read")


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
        within = f" of line {error.lineno} of the row" if error.lineno > 1 else ""
        raise RowError("bad_json", f"{error.msg} at column {error.colno}{within}") from error
    except UnicodeDecodeError as error:
        raise RowError("bad_json", f"not UTF-8 text (byte {error.start})") from error
