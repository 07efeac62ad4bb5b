"""A uniform random sample of the prompts of a data set, in bounded memory."""

import os
import random
from collections.abc import Sequence
from typing import Any

from coati.dataset.prepare.validation import BadRowBudget
from coati.dataset.report.report_warnings import unused_content
from coati.dataset.rows.column_names import Layout
from coati.dataset.rows.input_files import source_rows
from coati.dataset.rows.row_errors import RowError
from coati.dataset.rows.source_row import SourceRow
from coati.utils.logging import get_logger

logger = get_logger(__name__)

MAX_EXAMPLES = 3  # of unusable rows


def sample_prompts(
    paths: Sequence[str | os.PathLike],
    size: int,
    seed: int = 42,
    layout: Layout | None = None,
    strict_columns: bool = False,
) -> list[dict[str, Any]]:
    """``size`` prompts (or all, if there are fewer) drawn uniformly from the rows of ``paths``, in
    the order of the files.

    A prompt of one turn is ``{"instruction", "id"}``, a longer one ``{"messages", "id"}``; ``id``
    counts the usable rows from 0, and ``gt_answer`` and ``category`` are kept. How many rows cannot
    be used is logged, and which columns with content are not read. ``layout``: what columns of
    other names are.

    Raises:
        ValueError: if no row can be used, and with ``strict_columns`` for content that is not read.
    """
    rng = random.Random(seed)
    drawn: list[tuple[int, SourceRow]] = []
    examples: list[str] = []
    unread: dict[str, dict[str, Any]] = {}
    budget = BadRowBudget(False, 1.0, strict_columns)
    usable = unusable = 0
    for place, found in source_rows(paths, "prompt", layout):
        if isinstance(found, RowError):
            unusable += 1
            if len(examples) < MAX_EXAMPLES:
                examples.append(f"{place}: {found}")
            continue
        for name in (name for name, carries in found.unused.items() if carries):
            unread.setdefault(name, {"rows": 0, "first": place})["rows"] += 1
        budget.check_columns(unread)
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
    for warning in unused_content({"unused_content": unread, "rows_kept": usable}):
        logger.warning(warning)
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
