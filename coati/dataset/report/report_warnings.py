"""What in a preparation's report deserves a second look before training."""

from collections.abc import Iterator
from typing import Any

from coati.dataset.data_types import DATA_TYPES
from coati.dataset.report.rendering_warnings import rendering_warnings

Report = dict[str, Any]
FEW_ROWS = 50
MUCH_TRUNCATED = 0.10
MUCH_DROPPED = 0.10
LITTLE_SUPERVISED = 0.02


def warnings_of(report: Report) -> list[str]:
    """One sentence per finding: what is odd and what to do about it."""
    return [
        *_never_ends(report),
        *unused_content(report),
        *_odd_rows(report),
        *rendering_warnings(report),
    ]


def unused_content(report: Report) -> Iterator[str]:
    """The columns and fields that carry content and were not read."""
    for name, entry in report.get("unused_content", {}).items():
        top = not any(mark in name for mark in ".[ ")
        column = f"{name}=" if top else f"'{name}='"
        yield (
            f"{name} is not read, in {entry['rows']} of {report['rows_kept']} rows (the first: "
            f"{entry['first']}); if it is not to be read, say so with --columns {column}"
        )


def _never_ends(report: Report) -> Iterator[str]:
    rows = report["rows_written"]
    ended = report["rows_ended"]
    type = DATA_TYPES[report["type"]]
    if not (type.supervised and type.every_row_ends) or ended == rows:
        return
    part = report.get("part", "training")
    missing = (
        f"in none of the {rows} {part} rows"
        if not ended
        else f"in only {ended} of {rows} {part} rows"
    )
    yield (
        f"the end of a response is learned {missing}: a model trained on such rows does not learn "
        "to stop; check end_of_assistant and stop_ids of the template"
    )


def _odd_rows(report: Report) -> Iterator[str]:
    """What the counts of rows and tokens say."""
    type = DATA_TYPES[report["type"]]
    read = report["rows_read"]
    kept = report["rows_kept"]
    written = report["rows_written"]
    if written > 1 and not report["answers_differ"]:
        yield (
            f"all {type.responses} are identical: there is nothing to learn but one text; is the "
            "right column read?"
        )
    for entry in report["files"]:
        if entry["rows_read"] and not entry["rows_kept"]:
            yield f"{entry['file']}: none of its {entry['rows_read']} rows was kept"
    if 2 * report["rows_malformed"] > read:
        yield "more than half of the rows are malformed: is this the right type and file?"
    for reason, entry in report["dropped"].items():
        if entry["rows"] > MUCH_DROPPED * read and entry["kind"] == "unfit":
            remedy = "; raise max_length to keep them" if reason == "too_long" else ""
            what = f"{entry['meaning']} ({reason}){remedy}"
            yield f"{entry['rows']} of {read} rows were dropped: {what}"
    if report["rows_truncated"] > MUCH_TRUNCATED * kept:
        yield (
            f"{report['rows_truncated']} of {kept} rows lost their last rounds because they are "
            f"longer than max_length {report['max_length']}; raise max_length to learn from all of "
            "them"
        )
    if type.supervised and report["tokens"] and report["supervised_share"] < LITTLE_SUPERVISED:
        yield (
            f"only {report['supervised_share']:.2%} of the tokens are trained on: the responses "
            "are tiny beside their prompts, so most of the compute is spent on context"
        )
    if 0 < written < FEW_ROWS and report.get("part") != "evaluation":
        yield f"only {written} training rows: too few to learn from; are these all the files?"
    yield from type.warnings(report)
    if empty := report["shards"].count(0):
        parts = len(report["shards"])
        yield f"{empty} of {parts} parts hold no row; fewer are enough (--num_spliced_dataset_bins)"
