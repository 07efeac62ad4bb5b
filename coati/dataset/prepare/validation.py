"""What ends a preparation: settings that cannot work, too many malformed rows, no rows left."""

from dataclasses import asdict, dataclass, field
from typing import Any

from coati.dataset.data_types import DATA_TYPES
from coati.dataset.prepare.shard_plan import MAX_BINS
from coati.dataset.report.report import dropped_lines
from coati.dataset.report.row_stats import RowStats
from coati.dataset.rows.formats import FORMATS_OF
from coati.dataset.rows.row_errors import DOCUMENTS, MALFORMED, REASONS

MOST_FREQUENT = 5
# Share of pairs whose two responses are equal above which a wrong column is the likely cause.
SAME_RESPONSES = 0.5


@dataclass(frozen=True)
class PrepareSettings:
    """What of the arguments of ``prepare_dataset`` is written into the report. Raises ValueError
    for a value that cannot work."""

    type: str
    format: str | None
    split: str | None
    max_length: int
    seed: int
    num_bins: int
    num_samples_per_bin: int
    eval_ratio: float
    documents: str | None = None
    columns: dict[str, str] = field(default_factory=dict)

    def named(self) -> dict[str, Any]:
        """The settings by name; of what most preparations do not have only what is there."""
        rare = ("documents", "columns")
        return {k: v for k, v in asdict(self).items() if k not in rare or v}

    def __post_init__(self):
        if self.type not in DATA_TYPES:
            raise ValueError(f"type must be one of {', '.join(DATA_TYPES)}, found {self.type!r}")
        formats = FORMATS_OF[self.type]
        if self.format not in (None, *formats):
            raise ValueError(
                f"format {self.format!r} does not exist for type {self.type}; known: "
                f"{', '.join(formats)}"
            )
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2 tokens, found {self.max_length}")
        if not 1 <= self.num_bins < MAX_BINS:
            raise ValueError(
                f"the number of bins must be between 1 and {MAX_BINS - 1}, found {self.num_bins}"
            )
        if self.num_samples_per_bin == 0:
            raise ValueError(
                "0 samples per bin leave nothing; give a positive number, or -1 for all rows"
            )
        if not 0 <= self.eval_ratio < 1:
            raise ValueError(f"eval_ratio must be at least 0 and below 1, found {self.eval_ratio}")


def documents_of(type: str, documents: str | None) -> str | None:
    """What of a .txt file is a row of ``type``: None for a line, as types other than documents have
    it. Raises ValueError for ``documents`` that ``type`` does not have."""
    if type not in DATA_TYPES or "document" not in DATA_TYPES[type].reads:
        if documents is not None:
            raise ValueError(
                f"documents ({documents}) says what of a .txt file is a document, and rows of type "
                f"{type} are none; leave it out, or use type text"
            )
        return None
    if documents not in (None, *DOCUMENTS):
        raise ValueError(f"documents must be one of {', '.join(DOCUMENTS)}, found {documents!r}")
    return documents or DOCUMENTS[0]


@dataclass(frozen=True)
class BadRowBudget:
    """How many malformed rows are tolerated: none when ``strict``, else a share of the rows.
    ``flag``: by which more are, for people to read."""

    strict: bool
    max_ratio: float
    strict_columns: bool = False
    flag: str = "--max_bad_ratio of coati prepare"

    def __post_init__(self):
        if not 0 <= self.max_ratio <= 1:
            raise ValueError(f"max_bad_ratio must be between 0 and 1, found {self.max_ratio}")

    def check(self, stats: RowStats, expected: int) -> None:
        """Raise ValueError with the most frequent faults when too many of the rows so far are bad.
        ``expected``: the rows there are to read."""
        if any(reason in MALFORMED or reason == "same_answers" for reason in stats.dropped):
            dropped = {
                reason: {"rows": n, "first": stats.first[reason]}
                for reason, n in stats.dropped.items()
            }
            self.check_counts(dropped, stats.read.total(), expected)
        if self.strict_columns and stats.missing:
            self.check_columns(
                {
                    name: {"rows": rows, "first": stats.first_missing[name]}
                    for name, rows in stats.missing.most_common()
                }
            )

    def check_columns(self, unused: dict[str, dict]) -> None:
        """Raise ValueError for content that was not read, where none may be."""
        if self.strict_columns and unused:
            found = "\n".join(
                f"  {name} (the first: {entry['first']})"
                for name, entry in list(unused.items())[:MOST_FREQUENT]
            )
            left_out = " ".join(f"'{name}='" for name in list(unused)[:MOST_FREQUENT])
            raise ValueError(
                f"columns with content that is not read, and --strict_columns:\n{found}\n"
                "name what they are with --columns NAME=COLUMN, or leave them out with --columns "
                f"{left_out}"
            )

    def check_counts(self, dropped: dict[str, dict], read: int, expected: int) -> None:
        """:meth:`check` by the counts of a report."""
        bad = {reason: entry for reason, entry in dropped.items() if reason in MALFORMED}
        found = sum(entry["rows"] for entry in bad.values())
        if found and self.strict:
            rows = [
                f"{one} ({REASONS[reason]})"
                for reason, entry in bad.items()
                for one in entry["first"]
            ]
            raise ValueError("malformed row and --strict:\n  " + "\n  ".join(rows))
        if found > self.max_ratio * expected:
            most = sorted(bad.items(), key=lambda item: -item[1]["rows"])[:MOST_FREQUENT]
            reasons = "\n".join(
                f"  {entry['rows']} x {reason} ({REASONS[reason]}), for example\n"
                f"    {entry['first'][0]}"
                for reason, entry in most
            )
            raise ValueError(
                f"{found} of the first {read} rows are malformed; of all {expected} rows at most a "
                f"share of {self.max_ratio:g} may be. Most frequent:\n{reasons}\n"
                f"fix the rows, check the type and the input, or allow more with {self.flag}"
            )
        same = dropped.get("same_answers")
        share = max(SAME_RESPONSES, self.max_ratio)
        if same and same["rows"] > share * expected:
            raise ValueError(
                f"{same['rows']} of the first {read} pairs have the same response as chosen and as "
                f"rejected; of all {expected} rows at most a share of {share:g} may, and these are "
                f"dropped. For example\n    {same['first'][0]}\nis the right column read as "
                f"rejected? Fix the rows, or allow more with {self.flag}"
            )


def check_not_empty(report: dict[str, Any], what: str) -> None:
    """Raise ValueError for a report without rows; ``what`` was read for it."""
    if report["rows_written"] == 0 and report["rows_read"] == 0 and report.get("eval_ratio"):
        raise ValueError(
            f"nothing left: {what} has so few rows that all were drawn for evaluation; name "
            "evaluation rows of their own (--eval_input_dirs), or give --eval_ratio to the "
            "training command instead, which draws from the rows that are made here"
        )
    if report["rows_written"] == 0:
        reasons = "\n".join(dropped_lines(report["dropped"]))
        raise ValueError(
            f"nothing left: none of the {report['rows_read']} rows of {what} can be trained on; "
            f"fix the rows, raise max_length or choose another template\n{reasons}"
        )
