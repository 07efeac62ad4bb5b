"""A uniform random sample of the prompts of a data set, in bounded memory."""

import os
import random
from collections.abc import Sequence
from typing import Any

from coati.dataset.rows.input_files import source_rows
from coati.dataset.rows.row_errors import RowError
from coati.dataset.rows.source_row import SourceRow
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
    for place, found in source_rows(paths, "prompt"):
        if isinstance(found, RowError):
            unusable += 1
            if len(examples) < MAX_EXAMPLES:
                examples.append(f"{place}: {found}")
            continue
        # Reservoir sampling (algorithm R, Vitter 1985): after n rows each of them is in the sample
        # with probability size / n.
        slot = usable if usable < size else rng.randrange(usable + 1)
        if slot < size:
            drawn[slot : slot + 1] = [(usable, found)]
        usable += 1
    shown = "".join(f"\n  {text}" for text in examples)
    if not drawn:
        raise ValueError(f"{', '.join(map(str, paths))}: no prompt found{shown}")
    if unusable:
        logger.warning(f"rows without a prompt, left out: {unusable}; the first:{shown}")
    return [_columns(index, row) for index, row in sorted(drawn, key=lambda pair: pair[0])]


def _columns(index: int, row: SourceRow) -> dict[str, Any]:
    columns: dict[str, Any] = {"messages": row.messages}
    if len(row.messages) == 1 and len(row.messages[0]) == 2 and not row.tools:
        columns = {"instruction": row.messages[0]["content"]}
    columns["id"] = index
    if row.tools is not None:
        columns["tools"] = row.tools
    if row.gt_answer is not None:
        columns["gt_answer"] = row.gt_answer
    if row.category is not None:
        columns["category"] = row.category
    return columns
