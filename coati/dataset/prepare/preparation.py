"""Raw conversations to the shards that a trainer reads: read, compare, tokenize on all cores,
write, rename into place.

Rows keep their order and every row is encoded by itself, so the output is the same for any number
of processes, and whether or not the work was interrupted.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from coati.dataset.chat.conversation import Conversation
from coati.dataset.clean.cleaning import Cleaning
from coati.dataset.fingerprint import describe, differences, stamps
from coati.dataset.metadata import describe_template, describe_tokenizer
from coati.dataset.prepare.dedup_pass import HashWorker, compare_rows
from coati.dataset.prepare.shard_plan import (
    EVALUATION,
    Files,
    ShardPlan,
    is_evaluation,
    rows_of_a_chunk,
)
from coati.dataset.prepare.staging import PREPARATION, Counts, StagingDir, check_outputs
from coati.dataset.prepare.validation import (
    BadRowBudget,
    PrepareSettings,
    check_not_empty,
    documents_of,
)
from coati.dataset.prepare.workers import cores
from coati.dataset.prepare.write_pass import TokenizeWorker, WritePass, merged
from coati.dataset.report.report import build_report, format_report, in_parts, save_report
from coati.dataset.rows.column_names import Layout
from coati.dataset.rows.input_files import find_files, find_sources, read_as
from coati.dataset.rows.input_names import Source
from coati.dataset.rows.row_errors import DEFAULT_BAD_RATIO
from coati.utils.environment import command_line
from coati.utils.json_io import save_json
from coati.utils.logging import get_logger

logger = get_logger(__name__)

OF_AN_EARLIER_RELEASE = (
    "these rows were prepared by an earlier release, which left thoughts, tools and columns out "
    "without naming them; remove the folder to prepare them again"
)
# What the report of the training split says about the evaluation split.
IN_BRIEF = ("rows_read", "rows_kept", "rows_dropped", "rows_written", "tokens", "shards")


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
    columns: Mapping[str, str] | None = None,
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
    strict_columns: bool = False,
    max_bad_ratio: float = DEFAULT_BAD_RATIO,
    show: Callable[[str], None] | None = print,
    part: str = "training",
    verifiable: bool = True,
    documents: str | None = None,
) -> dict[str, Any]:
    """Write ``num_bins`` shards of training rows; return the report, which ``show`` gets.

    ``<arrow_dir>/part-XXXXX`` are ``datasets.load_from_disk`` folders beside ``preparation.json``;
    ``<jsonl_dir>/part-XXXXX.jsonl`` hold the same rows beside ``report.json``. Both appear under
    their names only when complete; calling again completes an interrupted preparation. An
    evaluation split, ``eval_ratio`` of the rows or those of ``eval_inputs``, has the same files
    below ``eval``. ``format`` names the one row format (see rows/formats.py), ``columns`` the
    column of each part of a row (see rows/column_names.py), ``split`` that of a data set with
    several. ``strict_columns``: content that is not read ends the preparation. ``part``: "training"
    or "evaluation" rows. ``verifiable``: whether some missing ground truths are warned of.
    ``documents``: what of a .txt file is one. Raises ValueError for unusable input or result.
    """
    settings = PrepareSettings(
        type, format, split, max_length, seed, num_bins, num_samples_per_bin, eval_ratio
    )
    named = dict(columns or {})
    settings = replace(settings, documents=documents_of(type, documents), columns=named)
    budget = BadRowBudget(strict, max_bad_ratio, strict_columns)
    check_outputs(*filter(None, (arrow_dir, jsonl_dir)))
    cleaning = cleaning or Cleaning()
    sources = _find_all(inputs, eval_inputs, settings)
    files = _files_of(sources, cleaning)
    made_from = describe(
        files, template, cleaning, jsonl=bool(jsonl_dir), **settings.named(), **_layouts_of(sources)
    )
    made_with = describe_tokenizer(tokenizer, tokenizer_name, made_from["tokenizer"])
    metadata = {"tokenizer": made_with, "part": part, "verifiable": verifiable}
    preparation = Preparation(
        sources, files, template, cleaning, settings, metadata, num_proc or cores(), budget
    )
    return _run(preparation, (arrow_dir, jsonl_dir, cache_dir), made_from, show)


def _run(
    preparation: "Preparation",
    folders: Sequence[str | os.PathLike | None],
    made_from: dict[str, Any],
    show: Callable[[str], None] | None,
) -> dict[str, Any]:
    paths = [None if folder is None else Path(folder) for folder in folders]
    report = preparation.run(StagingDir(*paths, made_from))
    if show is not None:
        _show(report, show)
    return report


def _find_all(
    inputs: Sequence, eval_inputs: Sequence, settings: PrepareSettings
) -> dict[str, list[Source]]:
    if settings.eval_ratio and eval_inputs:
        raise ValueError("eval_ratio takes evaluation rows, eval_inputs names others; give one")
    layout = Layout(settings.columns)
    return {
        "inputs": find_sources(inputs, settings.split, layout),
        "eval_inputs": find_sources(eval_inputs, settings.split, layout) if eval_inputs else [],
    }


def _files_of(sources: dict[str, list[Source]], cleaning: Cleaning) -> dict[str, list[Path]]:
    """The files by their use, those of the benchmarks too."""
    files = {use: [one.path for one in found] for use, found in sources.items()}
    benchmarks = cleaning.benchmark_files
    return files | {"benchmark_files": find_files(benchmarks) if benchmarks else []}


def _layouts_of(sources: dict[str, list[Source]]) -> dict[str, Any]:
    """What the inputs say of their columns and rows, for the description; nothing of plain ones."""
    described = {
        f"{use} read as": {str(k): read_as(one) for k, one in enumerate(found)}
        for use, found in sources.items()
    }
    return {name: found for name, found in described.items() if any(found.values())}


@dataclass
class Preparation:
    """One preparation, wherever its output goes."""

    sources: dict[str, list[Source]]
    files: dict[str, list[Path]]  # by their use
    template: Conversation
    cleaning: Cleaning
    settings: PrepareSettings
    metadata: dict[str, Any]  # goes into the report and decides nothing
    num_proc: int
    budget: BadRowBudget

    def run(self, staging: StagingDir) -> dict[str, Any]:
        """The report of the training split; the work is done unless the outputs are there."""
        report = staging.finished()
        if report is None or staging.root.exists():
            with staging.locked():  # perhaps after another process that did the same
                return staging.finished() or self._make(staging)
        logger.info(
            f"{staging.arrow_output} is prepared already, from the same rows and with the same "
            "settings"
        )
        if "unused_columns" not in report:
            logger.info(OF_AN_EARLIER_RELEASE)
        read = report["rows_read"]
        self.budget.check_counts(report["dropped"], read, expected=read)
        self.budget.check_columns(report.get("unused_content", {}))
        return report

    def _make(self, staging: StagingDir) -> dict[str, Any]:
        with staging.building():
            plan = self._plan()
            counts = self._write(staging, plan)
            differs = differences(staging.made_from, staging.made_from | stamps(self.files))
            if differs:
                raise ValueError(
                    f"an input changed while it was read ({differs}); start again when it is "
                    "complete"
                )
            report = self._report(plan, counts, evaluation=False)
            if any(map(is_evaluation, counts)):
                evaluation = self._report(plan, counts, evaluation=True)
                self._save(staging, evaluation, EVALUATION)
                report["evaluation"] = {name: evaluation[name] for name in IN_BRIEF}
            self._save(staging, report, "")
        for warning in report["warnings"]:
            logger.warning(warning)
        return report

    def _plan(self) -> ShardPlan:
        documents = self.settings.documents
        train = Files(self.sources["inputs"], documents=documents)
        if train.total == 0:
            raise ValueError(
                f"{_names(train.paths)}: no rows found; expected one JSON object per line, an "
                "array, records under a header, or a text in a .txt file"
            )
        evaluation = None
        if self.files["eval_inputs"]:
            evaluation = Files(self.sources["eval_inputs"], len(train.paths), documents)
            if evaluation.total == 0:
                raise ValueError(f"{_names(evaluation.paths)}: no rows found for evaluation")
        settings = self.settings
        return ShardPlan.of(
            train,
            evaluation,
            settings.num_bins,
            settings.num_samples_per_bin,
            settings.seed,
            settings.eval_ratio,
        )

    def _write(self, staging: StagingDir, plan: ShardPlan) -> Counts:
        settings = self.settings
        sources = [*self.sources["inputs"], *self.sources["eval_inputs"]]
        files = [str(source.path) for source in sources]
        layouts = [source.layout for source in sources]
        chunk = rows_of_a_chunk(settings.documents)
        num_proc = min(self.num_proc, -(-plan.expected // chunk))
        duplicates = overlap = None
        if not all(map(staging.counts, plan.bins)):
            hashing = HashWorker(settings.type, settings.format, self.cleaning, layouts)
            duplicates, overlap = compare_rows(plan, hashing, staging, files, num_proc)
        worker = TokenizeWorker(
            type=settings.type,
            format=settings.format,
            files=files,
            conversation=self.template,
            max_length=settings.max_length,
            jsonl=staging.jsonl is not None,
            cleaning=self.cleaning,
            overlap=overlap,
            layouts=layouts,
        )
        return WritePass(plan, worker, staging, num_proc, self.budget).run(duplicates)

    def _report(self, plan: ShardPlan, counts: Counts, evaluation: bool) -> dict[str, Any]:
        mine = {
            shard: found for shard, found in counts.items() if is_evaluation(shard) == evaluation
        }
        files = plan.evaluation if evaluation and plan.evaluation else plan.train
        about = {"command": command_line(), **self.metadata}
        about |= {"part": "evaluation"} if evaluation else {}
        report = build_report(
            merged(mine),
            {files.first + number: str(path) for number, path in enumerate(files.paths)},
            [written for _, written in mine.values()],
            **self.settings.named(),
            rows_in_files=files.total,
            **about,
            template=describe_template(self.template),
            cleaning=self.cleaning.named(),
        )
        check_not_empty(report, f"the {about['part']} split, from {_names(files.paths)}")
        return report

    def _save(self, staging: StagingDir, report: dict[str, Any], below: str) -> None:
        save_report(report, [folder / below for folder in staging.folders])
        folder = staging.arrow / below
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


def _show(report: dict[str, Any], show: Callable[[str], None]) -> None:
    color = show is print and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    show(format_report(report, color=color))
    if found := report.get("evaluation"):
        show(
            f"evaluation split: rows read {found['rows_read']}, kept {found['rows_kept']}, dropped "
            f"{found['rows_dropped']}; rows written {found['rows_written']} in "
            f"{in_parts(found['shards'])}"
        )
