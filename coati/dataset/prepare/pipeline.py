"""The passes over the rows: one to compare them, when cleaning asks for it, and one to tokenize and
write them."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby

from coati.dataset.clean.overlap import Overlap, benchmark_grams
from coati.dataset.data_types import DATA_TYPES
from coati.dataset.prepare.dedup_pass import Refused, RowStats, Survey
from coati.dataset.prepare.shard_plan import (
    Bin,
    EvaluationShare,
    Files,
    Selection,
    Task,
    plan_bins,
    tasks,
)
from coati.dataset.prepare.shards import ShardWriter
from coati.dataset.prepare.staging import Counts, StagingDir
from coati.dataset.prepare.validation import BadRows
from coati.dataset.prepare.workers import Job, results
from coati.dataset.report.row_stats import Tally
from coati.utils.logging import get_logger

logger = get_logger(__name__)


@dataclass
class Rows:
    """All source rows and the shards they are meant for. ``evaluation``: files of the evaluation
    split alone."""

    train: Files
    evaluation: Files | None
    selection: Selection
    bins: list[Bin]

    @classmethod
    def of(
        cls,
        train: Files,
        evaluation: Files | None,
        num_bins: int,
        num_samples_per_bin: int,
        seed: int,
        eval_ratio: float,
    ) -> "Rows":
        """``num_bins`` shards of each split; of an evaluation split of fewer rows one for each
        row."""
        bins = plan_bins(train.total, num_bins, split=eval_ratio > 0)
        if evaluation is not None:
            bins += plan_bins(
                evaluation.total, min(num_bins, max(1, evaluation.total)), evaluation=True
            )
        share = EvaluationShare(eval_ratio, train.total, seed) if eval_ratio else None
        return cls(train, evaluation, Selection(num_samples_per_bin, seed, share), bins)

    @property
    def expected(self) -> int:
        """How many rows will be read."""
        sizes = [bin.end - bin.start for bin in self.bins if not bin.evaluation]
        drawn = self.selection.samples
        train = sum(sizes if drawn < 0 else (min(drawn, size) for size in sizes))
        return train + (self.evaluation.total if self.evaluation else 0)

    def tasks(self, bins: list[Bin], selection: Selection) -> Iterator[Task]:
        """The chunks of ``bins``, training files first."""
        for evaluation, part in groupby(bins, key=lambda bin: bin.evaluation):
            # Every row of an evaluation file is taken.
            chosen = (
                Selection(-1, selection.seed, refused=selection.refused)
                if evaluation
                else selection
            )
            yield from tasks(self.evaluation if evaluation else self.train, list(part), chosen)


def compare_rows(
    rows: Rows, survey: Survey, place: StagingDir, files: list[str], num_proc: int
) -> tuple[Refused | None, Overlap | None]:
    """Which rows are refused for other rows' sake, and the word runs that training rows must not
    have."""
    cleaning = survey.cleaning
    found = benchmark_grams(cleaning.benchmark_files, cleaning.overlap_words)
    refused = None
    if cleaning.compares_rows:
        refused = _survey(rows, survey, place, files, num_proc)
        if cleaning.deduplicate:
            refused.drop_equal()
        if cleaning.near_duplicates is not None:
            refused.drop_near(cleaning.near_duplicates)
        if cleaning.drop_eval_overlap:
            found += refused.evaluation_grams()
    return refused, Overlap.of(cleaning.overlap_words, found) if found else None


def _survey(
    rows: Rows, survey: Survey, place: StagingDir, files: list[str], num_proc: int
) -> Refused:
    book = RowStats(place.scratch)
    wanted = [
        bin for bin in rows.bins if survey.cleaning.compares_all or bin.evaluation or bin.split
    ]
    todo = [bin for bin in wanted if not all(map(book.has, bin.shards))]
    for task, notes in results(survey, rows.tasks(todo, rows.selection), num_proc, place.lock):
        if task.rows is not None:
            book.add(task.shard, notes)
            continue
        for shard in task.bin.shards:
            book.close(shard)
    return Refused(book, [shard for bin in wanted for shard in bin.shards], files)


@dataclass
class Writing:
    """The second pass: bins that are finished already are taken from ``place``, the others are
    made."""

    rows: Rows
    job: Job
    place: StagingDir
    num_proc: int
    limit: BadRows
    seen: Tally = field(default_factory=Tally)  # so far

    def run(self, refused: Refused | None) -> Counts:
        """What became of the rows of each shard, and how many were written; ``refused`` rows are
        dropped."""
        done: Counts = {}
        todo = []
        for bin in self.rows.bins:
            counts = self.place.counts(bin)
            if counts is None:
                self.place.clear(bin)
                todo.append(bin)
            else:
                done |= counts
        self.seen = merged(done)
        self.limit.check(self.seen)
        if todo:
            if done:
                logger.info(
                    f"{len(self.rows.bins) - len(todo)} of {len(self.rows.bins)} parts are done "
                    "already; going on"
                )
            self._write(todo, replace(self.rows.selection, refused=refused), done)
        return {shard: done[shard] for bin in self.rows.bins for shard in bin.shards}

    def _write(self, todo: list[Bin], selection: Selection, done: Counts) -> None:
        writers: dict[str, ShardWriter] = {}
        tallies: dict[str, Tally] = {}
        try:
            for task, made in results(
                self.job, self.rows.tasks(todo, selection), self.num_proc, self.place.lock
            ):
                self._open(task.bin, writers, tallies)
                if made is not None:
                    self._add(task, made, writers, tallies)
                    continue
                for writer in writers.values():
                    writer.close()
                counts = {shard: (tallies[shard], writer.rows) for shard, writer in writers.items()}
                self.place.store(task.bin, counts)
                done |= counts
                writers, tallies = {}, {}
        finally:
            for writer in writers.values():
                writer.abandon()

    def _open(self, bin: Bin, writers: dict[str, ShardWriter], tallies: dict[str, Tally]) -> None:
        for shard in bin.shards:
            if shard not in writers:
                jsonl = self.place.jsonl and self.place.jsonl / f"{shard}.jsonl"
                writers[shard] = ShardWriter(
                    DATA_TYPES[self.job.type], self.place.arrow / shard, jsonl
                )
                tallies[shard] = Tally()

    def _add(
        self, task: Task, made: tuple, writers: dict[str, ShardWriter], tallies: dict[str, Tally]
    ) -> None:
        arrow, text, tally = made
        self.seen.merge(tally)
        self.limit.check(self.seen)
        tallies[task.shard].merge(tally)
        writers[task.shard].add(arrow, text)


def merged(counts: Counts) -> Tally:
    """The tally of all shards together."""
    tally = Tally()
    for one, _ in counts.values():
        tally.merge(one)
    return tally
