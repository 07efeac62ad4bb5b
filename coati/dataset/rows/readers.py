"""Rows of one file of any kind, each with the line it stands on; :data:`KINDS` has one reader per
kind of file."""

import csv
import gzip
import io
import json
import re
import sys
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from coati.dataset.rows.embedded_text import DEEPEST, is_too_deep
from coati.dataset.rows.messages import is_message_list
from coati.dataset.rows.row_errors import RowError
from coati.dataset.rows.text_files import documents_of

BATCH = 1000  # rows of a parquet or arrow file at a time
BLOCK = 1 << 20  # bytes of a JSON array at a time
BLANK = b" \t\r\n"
# A string (it ends with its line at the latest), a bracket, a comma, or a quote whose string has
# not been read whole.
_MARK = re.compile(rb'"[^"\\\n]*(?:\\.[^"\\\n]*)*["\n]|[\[\]{}",]', re.DOTALL)
_HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")  # a character beyond 16 bits takes two such escapes
Rows = Iterator[tuple[int, Any]]


def read_rows(file: Path, documents: str | None = None) -> Rows:
    """``(line, row)`` of one file; a row is the undecoded line (bytes), a decoded object, a text or
    a RowError.

    In a parquet or arrow file the line is the number of the row, from 1. ``documents``: what of a
    .txt file is a row, one of DOCUMENTS; by default a line. Raises ValueError when the file is not
    what its name says.
    """
    try:
        _check_encoding(file)
        if documents is not None and kind_of(file) == ".txt":
            with _open(file) as stream:
                yield from documents_of(stream, documents)
        else:
            yield from KINDS[kind_of(file)](file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"{file}: damaged or not a gzip file ({error}); fetch or compress it again"
        ) from error
    except OSError as error:
        if not file.name.lower().endswith(".zst") or error.errno is not None:
            raise
        said = str(error).splitlines()[0]
        raise ValueError(
            f"{file}: damaged or not a zst file ({said}); fetch or compress it again"
        ) from error


def _check_encoding(file: Path) -> None:
    if kind_of(file) not in COLUMNAR:
        with _open(file) as stream:
            start = stream.read(2)
        if start in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError(
                f"{file}: is UTF-16 text, expected UTF-8; convert it with iconv -f UTF-16 -t UTF-8"
            )


def kind_of(file: Path) -> str | None:
    """The key of :data:`KINDS` that the file's name ends with; text files may be compressed."""
    name = file.name.lower()
    packed = name.endswith(PACKED)
    suffix = Path(name.removesuffix(".gz").removesuffix(".zst")).suffix
    return suffix if suffix in KINDS and not (packed and suffix in COLUMNAR) else None


def decode(row: Any) -> Any:
    """The object of what :func:`read_rows` yields. Raises RowError for a line that is not JSON."""
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, bytes):
        return row
    try:
        found = _DECODER.decode(row.removeprefix(BOM_UTF8).decode("utf-8").rstrip())
        if _HALF_PAIR.search(row):
            json.dumps(found, ensure_ascii=False).encode("utf-8")
        if is_too_deep(found, row.count(b"[") + row.count(b"{")):
            raise RowError("bad_json", f"objects or lists more than {DEEPEST} deep in each other")
        return found
    except RowError:
        raise
    except json.JSONDecodeError as error:
        raise RowError("bad_json", _place(error, row)) from error
    except UnicodeEncodeError as error:
        raise RowError(
            "bad_json", f"half of a character ({error.object[error.start]!a}) without the other"
        ) from error
    except UnicodeDecodeError as error:
        raise RowError("bad_json", f"not UTF-8 text (byte {error.start})") from error
    except (ValueError, RecursionError) as error:  # huge integers, and very deep nesting
        raise RowError("bad_json", str(error).partition("; use sys.")[0]) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RowError("bad_json", f"the key {twice!r} occurs twice in one object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)  # json.loads would make one for every row


def _place(error: json.JSONDecodeError, row: bytes) -> str:
    if b"\0" in row:
        return (
            f"NUL bytes, the first at column {row.index(0) + 1}: UTF-16 text, or a file that was "
            "not written whole"
        )
    if row.strip() in (b"{", b"["):
        return (
            "the object goes on in the next line; write one object per line, or one array over the "
            "whole file"
        )
    within = f" of line {error.lineno} of the row" if error.lineno > 1 else ""
    return f"{error.msg.removesuffix(' at')} at column {error.colno}{within}"


def _open(file: Path):
    name = file.name.lower()
    if name.endswith(".zst"):
        return _open_zst(file)
    return gzip.open(file, "rb") if name.endswith(".gz") else open(file, "rb")


class _Zst(io.RawIOBase):
    """A stream that pyarrow's codec decompresses, frame after frame."""

    def __init__(self, file: Path):
        import pyarrow

        self._packed = pyarrow.OSFile(str(file))
        self._stream = pyarrow.CompressedInputStream(self._packed, "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        block = self._stream.read(len(buffer))
        buffer[: len(block)] = block
        return len(block)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
            self._packed.close()
        super().close()


def _open_zst(file: Path) -> BinaryIO:
    return io.BufferedReader(_Zst(file), BLOCK)


def _read_json(file: Path) -> Rows:
    return _read_array(file) if _is_array(file) else _lines(file)


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    with _open(file) as lines:
        yield from (
            (number, line)
            for number, line in enumerate(lines, 1)
            if line.strip(b" \t\r\n\xef\xbb\xbf")
        )


def _is_array(file: Path) -> bool:
    """One JSON array over the whole file, as against one object (or one list of messages) per
    line."""
    with _open(file) as stream:
        if not stream.read(4096).lstrip(b" \t\r\n\xef\xbb\xbf").startswith(b"["):
            return False
    with _open(file) as stream:
        first = next((text for _, text in array_elements(stream)), None)
    try:
        return not isinstance(first, bytes) or not is_message_list([json.loads(first)])
    except ValueError:
        return True


def _read_array(file: Path) -> Rows:
    with _open(file) as stream:
        yield from array_elements(stream)


def array_elements(stream: BinaryIO) -> Iterator[tuple[int, bytes | RowError]]:
    """``(line, text)`` of each element of the JSON array that begins at the first ``[``, found by
    the brackets: memory holds one element, undecoded. Blank elements are left out.

    The text of an element is not checked. Of an array without end, or with something behind its
    end, the last element is a RowError.
    """
    buffer, line = _after_bracket(stream)
    scanned = 0
    depth = 0
    wanted = BLOCK
    while True:
        start = 0
        for mark in _MARK.finditer(buffer, scanned):
            kind = mark.group()
            if kind == b'"':  # no end yet; the next block may bring it
                break
            scanned = mark.end()
            if kind in (b"{", b"["):
                depth += 1
            elif kind in (b"}", b"]"):
                depth -= 1
            if depth < 0 or (depth == 0 and kind == b","):
                yield from _element(buffer[start : mark.start()], line)
                line += buffer.count(b"\n", start, scanned)
                start = scanned
                if depth < 0:
                    yield from _after_array(buffer[start:], line, stream)
                    return
        more = stream.read(wanted)
        if not more:
            unclosed = "the brackets opened here are not closed; nothing further is read"
            yield line + _blank_lines(buffer[start:]), RowError("bad_json", unclosed)
            return
        # A long element is looked through in growing steps, so that its beginning is not copied
        # again and again.
        wanted = BLOCK if start else 2 * wanted
        buffer, scanned = buffer[start:] + more, scanned - start


def _after_bracket(stream: BinaryIO) -> tuple[bytes, int]:
    """What was read behind the first ``[``, and its line."""
    line = 1
    while block := stream.read(BLOCK):
        before, bracket, rest = block.partition(b"[")
        line += before.count(b"\n")
        if bracket:
            return rest, line
    return b"", line


def _after_array(rest: bytes, line: int, stream: BinaryIO) -> Iterator[tuple[int, RowError]]:
    """One error for a file that goes on behind its array."""
    while True:
        line += _blank_lines(rest)
        if found := rest.strip(BLANK):
            said = f"the array ends before {found[:40].decode('utf-8', 'replace')!r}"
            yield line, RowError("bad_json", f"{said}, which is not read; write one array per file")
            return
        rest = stream.read(BLOCK)
        if not rest:
            return


def _blank_lines(text: bytes) -> int:
    """Line ends in the white space that ``text`` begins with."""
    return text[: len(text) - len(text.lstrip(BLANK))].count(b"\n")


def _element(text: bytes, line: int) -> Iterator[tuple[int, bytes]]:
    stripped = text.lstrip(BLANK)
    if stripped:
        yield line + _blank_lines(text), stripped.rstrip(BLANK)


def _read_text(file: Path) -> Rows:
    """One prompt per line."""
    for number, line in _lines(file):
        try:
            yield number, line.decode("utf-8-sig").strip("\r\n")
        except UnicodeDecodeError as error:
            yield number, RowError("bad_json", f"not UTF-8 text (byte {error.start})")


def _read_table(file: Path, delimiter: str) -> Rows:
    """Records under a header of column names; a record may go over several lines and stands on its
    first."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with (
        _open(file) as stream,
        io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="") as text,
    ):
        records = csv.reader(text, delimiter=delimiter, strict=True)
        header = _record(records)
        if isinstance(header, list):  # tables of pandas do not name their first column
            header = [name or f"column {number}" for number, name in enumerate(header, 1)]
            _check_names(file, header)
        line = records.line_num + 1
        while (record := _record(records)) is not None:
            if record:
                yield line, _named(record, header)
            line = records.line_num + 1


def _check_names(file: Path, names: list[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{file}: has two columns {twice}; rename one, or leave it out")


def _record(records) -> list[str] | RowError | None:
    try:
        return next(records, None)
    except csv.Error as error:
        return RowError("bad_csv", str(error))


def _named(
    record: list[str] | RowError, header: list[str] | RowError | None
) -> dict[str, str] | RowError:
    if isinstance(record, RowError) or isinstance(header, RowError):
        return record if isinstance(record, RowError) else header
    if len(record) != len(header):
        return RowError(
            "bad_csv",
            f"{len(record)} fields under {len(header)} columns ({', '.join(header)}); quote "
            "fields with commas",
        )
    if any("\udc80" <= letter <= "\udcff" for field in record for letter in field):
        return RowError("bad_csv", "not UTF-8 text")
    return dict(zip(header, record, strict=True))


def _read_parquet(file: Path) -> Rows:
    from pyarrow import parquet

    yield from _read_batches(file, lambda: parquet.ParquetFile(file).iter_batches(batch_size=BATCH))


def _read_arrow(file: Path) -> Rows:
    import pyarrow

    def batches():
        with pyarrow.memory_map(str(file)) as source:
            for batch in pyarrow.ipc.open_stream(source):
                yield from (batch.slice(start, BATCH) for start in range(0, batch.num_rows, BATCH))

    yield from _read_batches(file, batches)


def _read_batches(file: Path, batches: Callable[[], Iterator]) -> Rows:
    import pyarrow

    try:
        yield from enumerate((row for batch in batches() for row in _rows_of(batch, file)), 1)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        kind = kind_of(file).removeprefix(".")
        raise ValueError(
            f"{file}: not a readable {kind} file ({str(error).splitlines()[0]})"
        ) from error


# Where tables hold tools and their arguments as structures.
_SCHEMAS = re.compile(r"\b(?:tools|functions|tool_calls|function_call|arguments|parameters)\b")


def _rows_of(batch: Any, file: Path) -> list[dict]:
    """The rows of a batch. A table gives every schema of a tool, and the arguments of every call,
    the keys of all others, as nulls: those are left out."""
    _check_names(file, batch.schema.names)
    rows = batch.to_pylist()
    for field in batch.schema:
        if _SCHEMAS.search(f"{field.name} {field.type}") and "struct" in str(field.type):
            for row in rows:
                row[field.name] = _without_nulls(row[field.name])
    return rows


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


COLUMNAR = (".parquet", ".arrow")
PACKED = (".gz", ".zst")
KINDS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".ndjson": _read_json,
    ".parquet": _read_parquet,
    ".csv": partial(_read_table, delimiter=","),
    ".tsv": partial(_read_table, delimiter="\t"),
    ".txt": _read_text,
    ".arrow": _read_arrow,
}
