"""Which rows go into which shard, and in which chunks they travel there."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coati.dataset.sources import read_rows

CHUNK_ROWS = 128
MAX_BINS = 100_000  # part names have five digits
Chunk = list[tuple[int, int, Any]]  # (file index, line, row as read)


def plan_bins(total: int, bins: int, samples: int, seed: int) -> list[tuple[int, set[int] | None]]:
    """``(end, chosen)`` of each bin: it takes the rows before ``end`` that earlier bins left, or of them the chosen.

    Bins differ by one row at most. ``samples`` rows are drawn from each (negative: all are taken).
    """
    ends = [round(total * number / bins) for number in range(bins + 1)]
    if samples < 0:
        return [(end, None) for end in ends[1:]]
    plan = []
    for number, (start, end) in enumerate(zip(ends, ends[1:], strict=False)):
        chosen = random.Random(f"{seed}/{number}").sample(range(start, end), min(samples, end - start))
        plan.append((end, set(chosen)))
    return plan


def numbered_rows(files: list[Path]) -> Iterator[tuple[int, int, Any]]:
    for index, file in enumerate(files):
        for line, row in read_rows(file):
            yield index, line, row


def plan_chunks(files: list[Path], plan: list[tuple[int, set[int] | None]]) -> Iterator[tuple[int, Chunk]]:
    """``(bin, rows)``: chunks never reach over the border of a bin."""
    number, chunk = 0, []
    for position, row in enumerate(numbered_rows(files)):
        while position >= plan[number][0]:
            if chunk:
                yield number, chunk
            number, chunk = number + 1, []
        if plan[number][1] is None or position in plan[number][1]:
            chunk.append(row)
        if len(chunk) == CHUNK_ROWS:
            yield number, chunk
            chunk = []
    if chunk:
        yield number, chunk
