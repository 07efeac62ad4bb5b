"""Raw conversations to shards a trainer reads: read, compare, tokenize on all cores, write, rename
into place.

Rows keep their order and every row is encoded by itself, so the output is the same for any number
of processes, and the same whether or not the work was interrupted.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coati.dataset.chat.conversation import Conversation
from coati.dataset.clean.cleaning import Cleaning, RowChecks
from coati.dataset.fingerprint import describe, differences, stamps
from coati.dataset.metadata import command_line, describe_template, describe_tokenizer
from coati.dataset.prepare.dedup_pass import Survey
from coati.dataset.prepare.pipeline import Rows, Writing, compare_rows, merged
from coati.dataset.prepare.shard_plan import CHUNK_ROWS, EVALUATION, Files, is_evaluation
from coati.dataset.prepare.staging import PREPARATION, Counts, StagingDir, check_outputs
from coati.dataset.prepare.validation import BadRows, check_result, check_settings
from coati.dataset.prepare.workers import Job, cores
from coati.dataset.report.report import build_report, format_report, save_report
from coati.dataset.rows.input_files import find_files
from coati.dataset.rows.row_errors import DEFAULT_BAD_RATIO
from coati.utils.json_io import save_json
from coati.utils.logging import get_logger

logger = get_logger(__name__)

IN_BRIEF = (
    "rows_read",
    "rows_kept",
    "rows_dropped",
    "rows_written",
    "tokens",
    "shards",
)  # of the evaluation split


def prepare_dataset(
    *,
    inputs: Sequence[str | os.PathLike],
    tokenizer,
    template: Conversation,
    arrow_dir: str | os.PathLike,
    jsonl_dir: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    type: str = "sft",
    format: str | None = None,
    split: str | None = None,
    tokenizer_name: str = "",
    max_length: int = 4096,
    num_bins: int = 10,
    num_samples_per_bin: int = -1,
    seed: int = 42,
    eval_ratio: float = 0.0,
    eval_inputs: Sequence[str | os.PathLike] = (),
    cleaning: Cleaning | None = None,
    num_proc: int | None = None,
    strict: bool = False,
    max_bad_ratio: float = DEFAULT_BAD_RATIO,
    show: Callable[[str], None] | None = print,
) -> dict[str, Any]:
    """Write ``num_bins`` shards of training rows and return the report, which is also given to
    ``show``.

    ``<arrow_dir>/part-XXXXX`` are ``datasets.load_from_disk`` folders beside ``preparation.json``;
    ``<jsonl_dir>/part-XXXXX.jsonl`` hold the same rows beside ``report.json``. Both appear under
    their names only when whole. An evaluation split, ``eval_ratio`` of the rows or those of
    ``eval_inputs``, has the same files below
    ``eval``. ``format`` names the one shape that rows have (see shapes.py), ``split`` the part of a
    data set with several. An interrupted call is completed by the same call; outputs that it has
    made already give their report.
    ``strict``: the first malformed row ends the job. Raises ValueError for unusable input, settings
    or result.
    """
    settings = {
        "type": type,
        "format": format,
        "split": split,
        "max_length": max_length,
        "seed": seed,
    } | {
        "num_bins": num_bins,
        "num_samples_per_bin": num_samples_per_bin,
        "eval_ratio": eval_ratio,
    }
    check_settings(settings, eval_inputs, max_bad_ratio)
    outputs = [None if path is None else Path(path) for path in (arrow_dir, jsonl_dir, cache_dir)]
    check_outputs(*filter(None, outputs[:2]))
    preparation = Preparation(
        files=_find_all(inputs, eval_inputs, cleaning or Cleaning(), split),
        template=template,
        cleaning=cleaning or Cleaning(),
        settings=settings,
        told={"command": command_line()},
        num_proc=num_proc or cores(),
        limits={"strict": strict, "max_ratio": max_bad_ratio},
    )
    made_from = preparation.made_from(jsonl_dir is not None)
    preparation.told["tokenizer"] = describe_tokenizer(
        tokenizer, tokenizer_name, made_from["tokenizer"]
    )
    place = StagingDir(*outputs, made_from)
    report = place.finished()
    if report is None or place.root.exists():
        with place.locked():  # perhaps after another process that did the same
            report = place.finished() or preparation.make(place)
    else:
        logger.info(
            f"{arrow_dir} is prepared already, from the same rows and with the same settings"
        )
        preparation.check_stored(report)
    _show(report, show)
    return report


def _find_all(
    inputs: Sequence, eval_inputs: Sequence, cleaning: Cleaning, split: str | None
) -> dict[str, list[Path]]:
    return {
        "inputs": find_files(inputs, split),
        "eval_inputs": find_files(eval_inputs, split) if eval_inputs else [],
        "benchmark_files": find_files(cleaning.benchmark_files) if cleaning.benchmark_files else [],
    }


@dataclass
class Preparation:
    """All that is known of one preparation but where it takes place."""

    files: dict[str, list[Path]]
    template: Conversation
    cleaning: Cleaning
    settings: dict[str, Any]
    told: dict[str, Any]  # goes into the report and decides nothing
    num_proc: int
    limits: dict[str, Any]

    def made_from(self, jsonl: bool) -> dict[str, Any]:
        """What the result depends on."""
        return describe(self.files, self.template, self.cleaning, jsonl=jsonl, **self.settings)

    def make(self, place: StagingDir) -> dict[str, Any]:
        """Do what is not done yet, rename the outputs into place and return the report of the
        training split."""
        with place.building():
            rows = self._count()
            counts = self._write(place, rows)
            differs = differences(place.made_from, place.made_from | stamps(self.files))
            if differs:
                raise ValueError(
                    f"an input changed while it was read ({differs}); start again when it is "
                    "complete"
                )
            report = self._report(rows, counts, evaluation=False)
            if any(map(is_evaluation, counts)):
                evaluation = self._report(rows, counts, evaluation=True)
                self._save(place, evaluation, EVALUATION)
                report["evaluation"] = {name: evaluation[name] for name in IN_BRIEF}
            self._save(place, report, "")
        for warning in report["warnings"]:
            logger.info(warning)
        return report

    def check_stored(self, report: dict[str, Any]) -> None:
        """Hold the rows of a finished preparation to this one's limits."""
        BadRows(**self.limits, expected=report["rows_read"]).check_counts(
            report["dropped"], report["rows_read"]
        )

    def _count(self) -> Rows:
        train = Files(self.files["inputs"])
        if train.total == 0:
            raise ValueError(
                f"{_names(train.paths)}: no rows found; expected one JSON object per line, an "
                "array, "
                "or records under a header"
            )
        evaluation = (
            Files(self.files["eval_inputs"], len(train.paths))
            if self.files["eval_inputs"]
            else None
        )
        if evaluation is not None and evaluation.total == 0:
            raise ValueError(f"{_names(evaluation.paths)}: no rows found for evaluation")
        numbers = {
            name: self.settings[name]
            for name in ("num_bins", "num_samples_per_bin", "seed", "eval_ratio")
        }
        return Rows.of(train, evaluation, **numbers)

    def _write(self, place: StagingDir, rows: Rows) -> Counts:
        settings = self.settings
        files = [str(path) for path in (*self.files["inputs"], *self.files["eval_inputs"])]
        num_proc = min(self.num_proc, -(-rows.expected // CHUNK_ROWS))
        refused = overlap = None
        if not all(map(place.counts, rows.bins)):
            survey = Survey(settings["type"], settings["format"], self.cleaning)
            refused, overlap = compare_rows(rows, survey, place, files, num_proc)
        job = Job(
            type=settings["type"],
            format=settings["format"],
            files=files,
            conversation=self.template,
            max_length=settings["max_length"],
            jsonl=place.jsonl is not None,
            checks=RowChecks(self.cleaning, overlap),
        )
        writing = Writing(
            rows, job, place, num_proc, BadRows(**self.limits, expected=rows.expected)
        )
        return writing.run(refused)

    def _report(self, rows: Rows, counts: Counts, evaluation: bool) -> dict[str, Any]:
        mine = {
            shard: found for shard, found in counts.items() if is_evaluation(shard) == evaluation
        }
        from_files = rows.evaluation if evaluation and rows.evaluation else rows.train
        report = build_report(
            merged(mine),
            {from_files.first + number: str(path) for number, path in enumerate(from_files.paths)},
            [written for _, written in mine.values()],
            **self.settings,
            rows_in_files=from_files.total,
            **self.told,
            template=describe_template(self.template),
            cleaning=self.cleaning.named(),
            part="evaluation" if evaluation else "training",
        )
        check_result(
            report,
            f"the {'evaluation' if evaluation else 'training'} split, from "
            f"{_names(from_files.paths)}",
        )
        return report

    def _save(self, place: StagingDir, report: dict[str, Any], below: str) -> None:
        save_report(report, [folder / below for folder in place.folders])
        folder = place.folders[-1] / below
        self.template.save(folder / "conversation_template.json")
        preparation = {
            "type": report["type"],
            "max_length": report["max_length"],
            "tokenizer": report["tokenizer"],
            "conversation_template": self.template.to_config(),
            "rows": report["rows_written"],
            "report": report,
        }
        save_json(preparation, folder / PREPARATION)


def _names(files: Sequence[Path]) -> str:
    return ", ".join(map(str, files[:5])) + (", ..." if len(files) > 5 else "")


def _show(report: dict[str, Any], show: Callable[[str], None] | None) -> None:
    if show is None:
        return
    show(
        format_report(
            report, color=show is print and sys.stdout.isatty() and "NO_COLOR" not in os.environ
        )
    )
    if found := report.get("evaluation"):
        show(
            f"evaluation split: rows read {found['rows_read']}, kept {found['rows_kept']}, dropped "
            f"{found['rows_dropped']}; rows written {found['rows_written']} in "
            f"{len(found['shards'])} parts"
        )
