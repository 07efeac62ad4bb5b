"""Shards on disk: ``part-XXXXX/`` in arrow form for the trainers, ``part-XXXXX.jsonl`` for people."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa

IDS = pa.list_(pa.int32())
MASK = pa.list_(pa.bool_())
TEXTS = pa.list_(pa.string())
_COMMON = {"seq_length": pa.int32(), "seq_category": pa.string()}
SCHEMAS = {
    "sft": pa.schema(
        {"input_ids": IDS, "labels": IDS, "inputs_decode": pa.string(), "labels_decode": TEXTS, **_COMMON}
    ),
    "prompt": pa.schema({"input_ids": IDS, "inputs_decode": pa.string(), **_COMMON, "gt_answer": pa.string()}),
    "preference": pa.schema(
        {
            **{
                f"{side}_{name}": kind
                for side in ("chosen", "rejected")
                for name, kind in (("input_ids", IDS), ("loss_mask", MASK), ("label_decode", TEXTS))
            },
            "margin": pa.float32(),
            **_COMMON,
        }
    ),
    "kto": pa.schema(
        {
            "prompt": IDS,
            "completion": IDS,
            "label": pa.bool_(),
            "input_id_decode": pa.string(),
            "completion_decode": pa.string(),
            **_COMMON,
        }
    ),
}


def part_name(number: int) -> str:
    return f"part-{number:05d}"


def to_arrow(type: str, rows: list[dict[str, Any]]) -> bytes:
    """``rows`` as an arrow IPC stream, which crosses a process border cheaply."""
    schema = SCHEMAS[type]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as stream:
        stream.write_table(pa.Table.from_pylist(rows, schema=schema))
    return sink.getvalue().to_pybytes()


class ShardWriter:
    """Appends chunks to the shards in order; memory holds one chunk, the cache one shard."""

    def __init__(self, type: str, arrow: Path, jsonl: Path | None, cache: Path, bins: int):
        self.schema, self.arrow, self.jsonl, self.cache = SCHEMAS[type], arrow, jsonl, cache
        self.rows = [0] * bins
        self._number = -1
        self._stream = self._text = None

    def add(self, number: int, arrow: bytes, text: bytes) -> None:
        """Append a chunk to shard ``number``, which never decreases from call to call."""
        while self._number < number:
            self._next_shard()
        for batch in pa.ipc.open_stream(arrow):
            self._stream.write_batch(batch)
            self.rows[number] += batch.num_rows
        if self._text is not None:
            self._text.write(text)

    def close(self) -> None:
        """Finish the last shard; shards no chunk fell into are written without rows."""
        while self._number < len(self.rows) - 1:
            self._next_shard()
        self._finish_shard()

    def _next_shard(self) -> None:
        self._finish_shard()
        self._number += 1
        name = part_name(self._number)
        self._stream = pa.ipc.new_stream(str(self.cache / name), self.schema)
        if self.jsonl is not None:
            self._text = open(self.jsonl / f"{name}.jsonl", "wb")

    def _finish_shard(self) -> None:
        if self._stream is None:
            return
        self._stream.close()
        if self._text is not None:
            self._text.close()
        name = part_name(self._number)
        _save_to_disk(self.cache / name, self.arrow / name)
        (self.cache / name).unlink()
        self._stream = self._text = None


def _save_to_disk(stream: Path, folder: Path) -> None:
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with pa.memory_map(str(stream)) as source:
            # With the number of files left open, a shard without rows gets none and can never be loaded.
            datasets.Dataset(pa.ipc.open_stream(source).read_all()).save_to_disk(str(folder), num_shards=1)
    finally:
        if shown:
            datasets.enable_progress_bars()


def tokenizer_fingerprint(tokenizer) -> str:
    """16 hex digits that differ when vocabulary, special tokens or the splitting of words and numbers differ."""
    known = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "probe": tokenizer.encode("Probe 12 345,6\n\tcafé 你好 can't", add_special_tokens=False),
    }
    return hashlib.sha256(json.dumps(known, ensure_ascii=False).encode("utf-8")).hexdigest()[:16]
