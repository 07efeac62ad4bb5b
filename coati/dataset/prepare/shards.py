"""Shards on disk: ``part-XXXXX/`` in arrow form for the trainers, ``part-XXXXX.jsonl`` for
people."""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa

from coati.dataset.types.data_type import DataType
from coati.utils.json_io import save_json

DATA_FILE = "data-00000-of-00001.arrow"


def to_arrow(type: DataType, rows: list[dict[str, Any]]) -> bytes:
    """``rows`` as an arrow IPC stream, which crosses a process border cheaply; with the optional
    columns if one of them has any."""
    schema = type.schema
    if type.needs_optional(rows):
        schema = type.whole_schema
        rows = [type.filled(row) for row in rows]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as stream:
        stream.write_table(pa.Table.from_pylist(rows, schema=schema))
    return sink.getvalue().to_pybytes()


class ShardWriter:
    """Writes one shard as chunks come: a ``datasets.load_from_disk`` folder and a file of JSON
    lines beside it."""

    def __init__(self, type: DataType, folder: Path, jsonl: Path | None):
        self.rows = 0
        self._type = type
        self._schema = type.schema
        self._folder = folder
        folder.mkdir(parents=True)
        self._hash = hashlib.blake2b(digest_size=8)
        self._file = open(folder / DATA_FILE, "wb")
        self._stream = pa.ipc.new_stream(self._file, self._schema)
        self._text = None
        if jsonl is not None:
            jsonl.parent.mkdir(parents=True, exist_ok=True)
            self._text = open(jsonl, "wb")

    def add(self, arrow: bytes, text: bytes) -> None:
        """Append what ``to_arrow`` made of a chunk, and its JSON lines."""
        self._hash.update(arrow)
        found = pa.ipc.open_stream(arrow)
        if found.schema != self._schema and self._schema == self._type.schema:
            self.widen()
        for batch in found:
            if batch.schema != self._schema:
                batch = _widened(self._type, batch)
            self._stream.write_batch(batch)
            self.rows += batch.num_rows
        if self._text is not None:
            self._text.write(text)

    def widen(self) -> None:
        """Go on with the optional columns, which no row needed so far."""
        self._stream.close()
        self._file.close()
        path = self._folder / DATA_FILE
        narrow = path.with_suffix(".narrow")
        path.rename(narrow)
        self._schema = self._type.whole_schema
        self._file = open(path, "wb")
        self._stream = pa.ipc.new_stream(self._file, self._schema)
        with open(narrow, "rb") as source:
            for batch in pa.ipc.open_stream(source):
                self._stream.write_batch(_widened(self._type, batch))
        narrow.unlink()

    def close(self) -> None:
        """Complete the shard; it is on disk even if the machine fails next."""
        self._stream.close()
        for file in filter(None, (self._file, self._text)):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        _describe_shard(self._folder, self._schema, self._hash.hexdigest())

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        """Close the files, of a shard that will not be completed, too."""
        for file in filter(None, (self._file, self._text)):
            file.close()


def _widened(type: DataType, batch: pa.RecordBatch) -> pa.RecordBatch:
    rows = [type.filled(row) for row in batch.to_pylist()]
    return pa.RecordBatch.from_pylist(rows, schema=type.whole_schema)


def unify(type: DataType, folders: list[Path]) -> None:
    """Give every shard the optional columns where one of ``folders`` has them, so that they can be
    read as one data set. Interrupted, it is done again."""
    narrow = [folder for folder in folders if _columns_of(folder) == type.schema]
    for folder in narrow if len(narrow) < len(folders) else ():
        wide = folder.with_name(f".{folder.name}.wide")
        shutil.rmtree(wide, ignore_errors=True)
        with ShardWriter(type, wide, None) as writer:
            writer.widen()
            writer.add((folder / DATA_FILE).read_bytes(), b"")
            writer.close()
        for file in ("state.json", "dataset_info.json", DATA_FILE):  # the data last: it is asked
            os.replace(wide / file, folder / file)
        wide.rmdir()


def _columns_of(folder: Path) -> pa.Schema:
    with open(folder / DATA_FILE, "rb") as source:
        return pa.ipc.open_stream(source).schema


def _describe_shard(folder: Path, schema: pa.Schema, fingerprint: str) -> None:
    """The two files that ``datasets.load_from_disk`` wants beside the data.

    ``fingerprint``: of the rows, since ``datasets`` finds what it computed earlier from a data set
    by this name.
    """
    import datasets

    datasets.DatasetInfo(features=datasets.Features.from_arrow_schema(schema)).write_to_directory(
        str(folder)
    )
    state = {
        "_data_files": [{"filename": DATA_FILE}],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    save_json(state, folder / "state.json")
