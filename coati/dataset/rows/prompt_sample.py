"""A random sample of the prompts of a data set, in bounded memory."""

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

FIRST_FEW = 3


def sample_prompts(
    paths: Sequence[str | os.PathLike], size: int, seed: int = 42
) -> list[dict[str, Any]]:
    """``size`` prompts (all, of fewer) drawn evenly from the rows of ``paths``, in their order
    there.

    A prompt of one turn is ``{"instruction", "id"}``, a longer one ``{"messages", "id"}``; ``id``
    counts the usable rows from 0, ``gt_answer`` and ``category`` are kept. Rows that cannot be used
    are counted and said. Raises ValueError when none can.
    """
    dice = random.Random(seed)
    drawn = []
    examples = []
    usable = unusable = 0
    for found in _prompts(paths):
        if isinstance(found, str):
            unusable += 1
            examples += [found] if len(examples) < FIRST_FEW else []
            continue
        # Algorithm R (Vitter 1985): after n rows each of them is in the sample with probability
        # size / n.
        place = usable if usable < size else dice.randrange(usable + 1)
        if place < size:
            drawn[place : place + 1] = [(usable, found)]
        usable += 1
    shown = "".join(f"\n  {text}" for text in examples)
    if not drawn:
        raise ValueError(f"{', '.join(map(str, paths))}: no prompt found{shown}")
    if unusable:
        logger.info(f"rows that hold no prompt and are left out: {unusable}; the first:{shown}")
    return [_columns(number, row) for number, row in sorted(drawn, key=lambda one: one[0])]


def _prompts(paths: Sequence[str | os.PathLike]) -> Iterator[SourceRow | str]:
    """Each row as a prompt, or what is wrong with it and where."""
    for file in find_files(paths):
        for line, row in read_rows(file):
            try:
                yield read_row("prompt", decode(row))
            except RowError as error:
                yield f"{file}:{line}: {error}"


def _columns(number: int, row: SourceRow) -> dict[str, Any]:
    single = len(row.messages) == 1
    columns: dict[str, Any] = (
        {"instruction": row.messages[0]["content"]} if single else {"messages": row.messages}
    )
    extra = {"gt_answer": row.gt_answer, "category": row.category}
    return (
        columns
        | {"id": number}
        | {name: value for name, value in extra.items() if value is not None}
    )
