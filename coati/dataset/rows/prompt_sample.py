"""A uniform random sample of the prompts of a data set, in bounded memory."""

import os
import random
from collections.abc import Iterator, Sequence
from typing import Any

from coati.dataset.rows.formats import SourceRow, read_row
from coati.dataset.rows.input_files import find_files
from coati.dataset.rows.readers import decode, read_rows
from coati.dataset.rows.row_errors import RowError
from coati.utils.logging import get_logger

logger = get_logger(__name__)

MAX_EXAMPLES = 3  # of unusable rows


def sample_prompts(
    paths: Sequence[str | os.PathLike], size: int, seed: int = 42
) -> list[dict[str, Any]]:
    """``size`` prompts (or all, if there are fewer) drawn uniformly from the rows of ``paths``, in
    the order of the files.

    A prompt of one turn is ``{"instruction", "id"}``, a longer one ``{"messages", "id"}``; ``id``
    counts the usable rows from 0, and ``gt_answer`` and ``category`` are kept. How many rows cannot
    be used is logged.

    Raises:
        ValueError: if no row can be used.
    """
    rng = random.Random(seed)
    drawn: list[tuple[int, SourceRow]] = []
    examples: list[str] = []
    usable = unusable = 0
    for found in _prompts(paths):
        if isinstance(found, str):
            unusable += 1
            if len(examples) < MAX_EXAMPLES:
                examples.append(found)
            continue
        # Reservoir sampling (algorithm R, Vitter 1985): after n rows each of them is in the sample
        # with probability size / n.
        place = usable if usable < size else rng.randrange(usable + 1)
        if place < size:
            drawn[place : place + 1] = [(usable, found)]
        usable += 1
    shown = "".join(f"\n  {text}" for text in examples)
    if not drawn:
        raise ValueError(f"{', '.join(map(str, paths))}: no prompt found{shown}")
    if unusable:
        logger.warning(f"rows without a prompt, left out: {unusable}; the first:{shown}")
    return [_columns(index, row) for index, row in sorted(drawn, key=lambda pair: pair[0])]


def _prompts(paths: Sequence[str | os.PathLike]) -> Iterator[SourceRow | str]:
    """Each row as a prompt, or a message on what is wrong with it."""
    for file in find_files(paths):
        for line, row in read_rows(file):
            try:
                yield read_row("prompt", decode(row))
            except RowError as error:
                yield f"{file}:{line}: {error}"


def _columns(index: int, row: SourceRow) -> dict[str, Any]:
    columns: dict[str, Any] = {"messages": row.messages}
    if len(row.messages) == 1:
        columns = {"instruction": row.messages[0]["content"]}
    columns["id"] = index
    if row.gt_answer is not None:
        columns["gt_answer"] = row.gt_answer
    if row.category is not None:
        columns["category"] = row.category
    return columns
