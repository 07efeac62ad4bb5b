"""The second pass: tokenize the rows and write the shards, bin by bin."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from coati.dataset.chat.conversation import Conversation
from coati.dataset.clean.cleaning import Cleaning, check_row
from coati.dataset.clean.overlap import Overlap
from coati.dataset.data_types import DATA_TYPES
from coati.dataset.prepare.dedup_pass import Duplicates
from coati.dataset.prepare.shard_plan import Bin, Chunk, ShardPlan
from coati.dataset.prepare.shards import ShardWriter, to_arrow, unify
from coati.dataset.prepare.staging import Counts, StagingDir
from coati.dataset.prepare.validation import BadRowBudget
from coati.dataset.prepare.workers import run_by_bin
from coati.dataset.report.row_stats import Recorder, RowStats
from coati.dataset.rows.column_names import Layout
from coati.dataset.rows.formats import read_row
from coati.dataset.rows.input_files import decode
from coati.dataset.rows.row_errors import RowError
from coati.dataset.types.data_type import Columns
from coati.utils.logging import get_logger

logger = get_logger(__name__)

_to_json = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make one for every row


@dataclass
class TokenizeWorker:
    """Turns source rows into training rows."""

    type: str
    format: str | None
    files: list[str]
    conversation: Conversation
    max_length: int
    jsonl: bool
    cleaning: Cleaning
    overlap: Overlap | None
    layouts: list[Layout] = field(default_factory=list)  # of each file

    def run(self, chunk: Chunk, evaluation: bool) -> tuple[bytes, bytes, RowStats]:
        """``(arrow stream, JSON lines, statistics)`` of one chunk."""
        made, stats = self.training_rows(chunk, evaluation)
        rows = [row for of_source in made for row in of_source]
        text = "".join(_to_json(row) + "\n" for row in rows) if self.jsonl else ""
        return to_arrow(DATA_TYPES[self.type], rows), text.encode("utf-8"), stats

    def training_rows(self, chunk: Chunk, evaluation: bool) -> tuple[list[list[Columns]], RowStats]:
        """The training rows of each source row of one chunk, none of one that cannot be used, and
        statistics."""
        data_type = DATA_TYPES[self.type]
        recorder = Recorder(data_type, self.conversation)
        all_made: list[list[Columns]] = []
        for file, line, raw in chunk:
            recorder.stats.read[file] += 1
            where = f"{self.files[file]}:{line}"
            layout = self.layouts[file] if self.layouts else None
            try:
                source = read_row(self.type, decode(raw), self.format, layout)
            except RowError as error:
                recorder.stats.drop(error, where)
                all_made.append([])
                continue
            if source.branches:
                recorder.stats.read[file] += len(source.branches)
            of_source: list[Columns] = []
            for one in (source, *source.branches):
                try:
                    check_row(one, self.cleaning, None if evaluation else self.overlap)
                    made = data_type.tokenize(one, self.conversation, self.max_length)
                except RowError as error:
                    recorder.stats.drop(error, where)
                    continue
                recorder.keep(file, line, where, one, made)
                of_source += [row for row, _ in made]
            all_made.append(of_source)
        return all_made, recorder.close()


@dataclass
class WritePass:
    """Takes the finished bins from ``staging`` and makes the others."""

    plan: ShardPlan
    worker: TokenizeWorker
    staging: StagingDir
    num_proc: int
    budget: BadRowBudget

    def run(self, duplicates: Duplicates | None) -> Counts:
        """The statistics of each shard and the rows written to it. Raises ValueError when the
        budget of bad rows is spent."""
        finished: Counts = {}
        todo = []
        for bin in self.plan.bins:
            counts = self.staging.counts(bin)
            if counts is None:
                self.staging.clear(bin)
                todo.append(bin)
            else:
                finished |= counts
        seen = merged(finished)
        self.budget.check(seen, self.plan.expected)
        bins = len(self.plan.bins)
        if finished and todo:
            logger.info(f"{bins - len(todo)} of {bins} parts are done already; going on")
        selection = replace(self.plan.selection, dropped=duplicates)
        tasks = self.plan.tasks(todo, selection)
        for bin, chunks in run_by_bin(self.worker, tasks, self.num_proc, self.staging.lock):
            counts = self._write(bin, chunks, seen)
            self.staging.store(bin, counts)
            finished |= counts
        unify(
            DATA_TYPES[self.worker.type],
            [self.staging.arrow / shard for bin in self.plan.bins for shard in bin.shards],
        )
        return {shard: finished[shard] for bin in self.plan.bins for shard in bin.shards}

    def _write(self, bin: Bin, chunks: Iterator[tuple[str, tuple]], seen: RowStats) -> Counts:
        stats = {shard: RowStats() for shard in bin.shards}
        with ExitStack() as files:
            writers = {shard: files.enter_context(self._writer(shard)) for shard in bin.shards}
            for shard, (arrow, text, found) in chunks:
                seen.merge(found)
                self.budget.check(seen, self.plan.expected)
                stats[shard].merge(found)
                writers[shard].add(arrow, text)
            for writer in writers.values():
                writer.close()
        return {shard: (stats[shard], writers[shard].rows) for shard in bin.shards}

    def _writer(self, shard: str) -> ShardWriter:
        jsonl = self.staging.jsonl and self.staging.jsonl / f"{shard}.jsonl"
        return ShardWriter(DATA_TYPES[self.worker.type], self.staging.arrow / shard, jsonl)


def merged(counts: Counts) -> RowStats:
    """The statistics of all shards together."""
    total = RowStats()
    for stats, _ in counts.values():
        total.merge(stats)
    return total
