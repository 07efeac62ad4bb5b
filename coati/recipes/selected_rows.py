"""The files of coati sample: rows to train on, and what choosing the best of several gains."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from coati.cli.program_settings import SampleSettings
from coati.inference.evaluate.result_files import aligned, shown
from coati.inference.samples.select_samples import (
    SELECTORS,
    BestOfK,
    Group,
    Selection,
    best_of_table,
)
from coati.utils.json_io import save_json, save_text

_SURROGATE = re.compile("[\ud800-\udfff]")

SUMMARY = "summary.json"


def write_rows(args: SampleSettings, groups: Sequence[Group], folder: Path) -> Iterator[str]:
    """Write each file of ``--write`` whole, and say how many rows it holds and of how many
    prompts."""
    threshold = float("-inf") if args.threshold is None else args.threshold
    selection = Selection(threshold, args.keep, args.margin, args.keep_truncated)
    unscored = sum(not group.scored for group in groups)
    if unscored:
        yield f"left out: {unscored} prompts of whose responses none could be scored"
    cut = sum(not one.stopped for group in groups for one in group.scored)
    if cut and not args.keep_truncated and set(args.write) != {"groups"}:
        whole = sum(len(group.scored) for group in groups)
        yield (
            f"{cut} of {whole} responses ended at --max_new_tokens; they are not learned "
            "(--keep_truncated)"
        )
    for kind in args.write:
        rows = [SELECTORS[kind](group, selection) for group in groups if group.scored]
        file = folder / f"{kind}.jsonl"
        lines = [_json(row) + "\n" for found in rows for row in found]
        save_text("".join(lines), file)
        yield f"{len(lines)} rows of {sum(map(bool, rows))} of {len(rows)} prompts are in {file}"


def _json(row: Any) -> str:
    text = json.dumps(row, ensure_ascii=False)
    # Half of a character, as a sampled token may be, has no UTF-8.
    return json.dumps(row) if _SURROGATE.search(text) else text


def best_of_lines(groups: Sequence[Group], seed: int) -> list[str]:
    """The table of the best of k, which :func:`save_summary` keeps as JSON."""
    found = best_of_table(groups, seed)
    header = ("best of", "score", "95% interval", "gain over one", "95% interval")
    return [aligned(header, [_cells(each) for each in found])] if found else []


def _cells(each: BestOfK) -> list[str]:
    return [
        str(each.k),
        shown(each.value),
        f"{shown(each.low)} to {shown(each.high)}",
        f"{each.gain:+.4g}",
        f"{shown(each.gain_low)} to {shown(each.gain_high)}",
    ]


def save_summary(groups: Sequence[Group], folder: Path, seed: int) -> None:
    """``summary.json``: the best of k, and each prompt's scores."""
    save_json(
        {
            "best_of": [vars(each) for each in best_of_table(groups, seed)],
            "scores": {group.prompt.place: group.scores for group in groups},
        },
        folder / SUMMARY,
    )
