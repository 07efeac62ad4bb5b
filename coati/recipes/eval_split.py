"""``--eval_ratio``: evaluation rows taken out of the training rows, the same at every start."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from coati.utils.constants import IGNORE_INDEX

# type -> the column whose beginning is the prompt, and the one that marks where responses begin
PROMPTS: dict[str, tuple[str, str | None]] = {
    "sft": ("input_ids", "labels"),
    "text": ("input_ids", "labels"),
    "preference": ("chosen_input_ids", "chosen_loss_mask"),
    "kto": ("prompt", None),
    "scored": ("input_ids", "loss_mask"),
    "prompt": ("input_ids", None),
}
CHUNK = 1000


def evaluation_mask(rows: Any, type: str, ratio: float, seed: int) -> np.ndarray:
    """(N,) whether each row is held out: about ``ratio`` of them, at least one, drawn by hash of
    ``seed`` and prompt. Rows of one prompt are on one side; what is held out depends neither on
    processes nor on the order of rows.

    Raises ValueError where all rows have one prompt.
    """
    keys = np.asarray(list(_keys(rows, type, seed)))
    names, group, counts = np.unique(keys, return_inverse=True, return_counts=True)
    if len(names) < 2:
        raise ValueError(
            f"--eval_ratio {ratio:g}: all {len(keys)} rows have the same prompt, so none can be "
            "held out; give evaluation rows of their own"
        )
    wanted = max(1, round(ratio * len(keys)))
    held = np.zeros(len(names), dtype=bool)
    taken = 0
    for place in range(len(names)):  # np.unique has sorted the hashes
        if taken + counts[place] <= wanted:
            held[place] = True
            taken += counts[place]
    if not taken:  # every prompt has more rows than are wanted
        held[np.argmin(counts)] = True
    return held[group]


def _keys(rows: Any, type: str, seed: int) -> Iterator[str]:
    """A hash of the prompt of each row."""
    column, marks = PROMPTS[type]
    start = str(seed).encode()
    names = [column] if marks is None else [column, marks]
    tables = rows.select_columns(names).with_format("arrow")
    for first in range(0, len(rows), CHUNK):
        table = tables[first : first + CHUNK]
        ids = list(_lists(table[column]))
        ends = [len(row) for row in ids] if marks is None else _ends(table[marks], marks)
        for row, end in zip(ids, ends, strict=True):
            # Plain text has no prompt.
            prompt = row[:end] if end > 1 else row
            yield hashlib.sha256(start + prompt.astype(np.int32).tobytes()).hexdigest()


def _ends(marks: Any, name: str) -> list[int]:
    """Where the first response of each row begins. ``name``: of the column ``marks``."""
    responses = [
        (row != IGNORE_INDEX) if name == "labels" else row.astype(bool) for row in _lists(marks)
    ]
    return [int(row.argmax()) if row.any() else len(row) for row in responses]


def _lists(column: Any) -> Iterator[np.ndarray]:
    """The lists of an arrow column."""
    for chunk in column.chunks:
        values = chunk.flatten().to_numpy(zero_copy_only=False)
        ends = np.cumsum(chunk.value_lengths().to_numpy(zero_copy_only=False)).tolist()
        yield from np.split(values, ends[:-1])
