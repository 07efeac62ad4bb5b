"""What makes a preparation give up: settings that cannot work, too many malformed rows, a result
without rows."""

from dataclasses import dataclass
from typing import Any

from coati.dataset.data_types import DATA_TYPES
from coati.dataset.prepare.shard_plan import MAX_BINS
from coati.dataset.report.report import dropped_lines
from coati.dataset.report.row_stats import Tally
from coati.dataset.rows.formats import FORMATS_OF
from coati.dataset.rows.row_errors import MALFORMED, REASONS

MOST_FREQUENT = 5
SAME_ANSWERS = (
    0.5  # share of pairs with one answer twice above which a wrong column is taken to be the cause
)


def check_settings(settings: dict[str, Any], eval_inputs: Any, max_bad_ratio: float) -> None:
    """Raise ValueError for a setting of ``prepare_dataset`` that cannot work."""
    type, format, num_bins, eval_ratio = (
        settings[name] for name in ("type", "format", "num_bins", "eval_ratio")
    )
    if type not in DATA_TYPES:
        raise ValueError(f"type must be one of {', '.join(DATA_TYPES)}, found {type!r}")
    if format not in (None, *FORMATS_OF[type]):
        raise ValueError(
            f"format {format!r} does not exist for type {type}; known: "
            f"{', '.join(FORMATS_OF[type])}"
        )
    if settings["max_length"] < 2:
        raise ValueError(f"max_length must be at least 2 tokens, found {settings['max_length']}")
    if not 1 <= num_bins < MAX_BINS:
        raise ValueError(
            f"the number of bins must be between 1 and {MAX_BINS - 1}, found {num_bins}"
        )
    if settings["num_samples_per_bin"] == 0:
        raise ValueError(
            "0 samples per bin leave nothing; give a positive number, or -1 for all rows"
        )
    if not 0 <= eval_ratio < 1:
        raise ValueError(f"eval_ratio must be at least 0 and below 1, found {eval_ratio}")
    if eval_ratio and eval_inputs:
        raise ValueError(
            "eval_ratio takes evaluation rows from the training files, eval_inputs names others; "
            "give one"
        )
    if not 0 <= max_bad_ratio <= 1:
        raise ValueError(f"max_bad_ratio must be between 0 and 1, found {max_bad_ratio}")


@dataclass
class BadRows:
    """How many malformed rows are borne. ``expected``: the rows there are to read."""

    strict: bool
    max_ratio: float
    expected: int

    def check(self, tally: Tally) -> None:
        """Raise ValueError with what is most often wrong when the rows so far are too bad."""
        if any(reason in MALFORMED or reason == "same_answers" for reason in tally.dropped):
            dropped = {
                reason: {"rows": n, "first": tally.first[reason]}
                for reason, n in tally.dropped.items()
            }
            self.check_counts(dropped, tally.read.total())

    def check_counts(self, dropped: dict[str, dict], read: int) -> None:
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
        if found > self.max_ratio * self.expected:
            few = sorted(bad.items(), key=lambda item: -item[1]["rows"])[:MOST_FREQUENT]
            reasons = [
                f"  {e['rows']} x {why} ({REASONS[why]}), for example\n    {e['first'][0]}"
                for why, e in few
            ]
            raise ValueError(
                f"{found} of the first {read} rows are malformed; of all {self.expected} rows at "
                "most a share of "
                f"{self.max_ratio:g} may be (--max_bad_ratio). Most frequent:\n"
                + "\n".join(reasons)
                + "\n"
                "mend the rows, check the type and the input, or allow more with --max_bad_ratio"
            )
        self._check_answers(dropped.get("same_answers"), read)

    def _check_answers(self, same: dict[str, Any] | None, read: int) -> None:
        share = max(SAME_ANSWERS, self.max_ratio)
        if same is None or same["rows"] <= share * self.expected:
            return
        raise ValueError(
            f"{same['rows']} of the first {read} pairs have the same answer as chosen and as "
            "rejected; of all "
            f"{self.expected} rows at most a share of {share:g} may, and these are dropped. For "
            "example\n    "
            f"{same['first'][0]}\nis the right column read as rejected? Mend the rows, or allow "
            "more with "
            "--max_bad_ratio"
        )


def check_result(report: dict[str, Any], what: str) -> None:
    """Raise ValueError for a report of no rows; ``what`` was read for it."""
    if report["rows_written"] == 0:
        reasons = "\n".join(dropped_lines(report["dropped"]))
        raise ValueError(
            f"nothing left: none of the {report['rows_read']} rows of {what} can be trained on; "
            "mend "
            f"the rows, raise max_length or choose another template\n{reasons}"
        )
