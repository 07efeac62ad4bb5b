"""Which rows go into which shard, and in which chunks they travel there."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from coati.dataset.rows.column_names import Layout
from coati.dataset.rows.input_files import warn_of_fewer
from coati.dataset.rows.input_names import Source
from coati.dataset.rows.joined_rows import parts_of, whole_rows
from coati.dataset.rows.row_errors import RowError

CHUNK_ROWS = 128
CHUNK_PIECES = 32  # of documents that are read in pieces, long rows
MAX_BINS = 100_000  # part names have five digits
EXACT_ROWS = 5_000_000  # up to here the evaluation split has exactly its share of the rows
EVALUATION = "eval"  # the folder of the evaluation split inside an output
Row = tuple[int, int, Any]  # (file index, line, row as read)
Chunk = list[Row]
# (shard, number of the row in it) -> why the row is dropped
Dropped = Callable[[str, int], RowError | None]


@dataclass(frozen=True)
class Bin:
    """The rows ``start`` to ``end`` of one split's files, which fill the shards of one number.

    ``evaluation``: they are rows of evaluation files. ``split``: some of them go to the evaluation
    shard.
    """

    number: int
    start: int
    end: int
    evaluation: bool = False
    split: bool = False

    @property
    def shards(self) -> list[str]:
        """Paths below an output."""
        train = f"part-{self.number:05d}"
        if self.evaluation:
            return [f"{EVALUATION}/{train}"]
        return [train, f"{EVALUATION}/{train}"] if self.split else [train]


def is_evaluation(shard: str) -> bool:
    return shard.startswith(f"{EVALUATION}/")


class Task(NamedTuple):
    """A chunk on its way to ``shard``; ``rows`` None: nothing more comes for ``bin``."""

    bin: Bin
    shard: str
    rows: Chunk | None


class Files:
    """The files of one split and the number of rows in each; their numbers begin at ``first``.
    ``documents``: as of read_rows."""

    def __init__(
        self, sources: Sequence[Source | Path], first: int = 0, documents: str | None = None
    ):
        found = [one if isinstance(one, Source) else Source(one) for one in sources]
        self.paths = [source.path for source in found]
        self._layouts = [source.layout for source in found]
        self.first = first
        self.documents = documents
        self.counts = _wanted_rows(found, documents)
        self.total = sum(self.counts)

    def rows(self, start: int) -> Iterator[Row]:
        """The rows from ``start`` on; files before it are not opened."""
        for number, (path, layout, count) in enumerate(
            zip(self.paths, self._layouts, self.counts, strict=True), self.first
        ):
            if count > start:
                rows = whole_rows(path, self.documents, layout)
                for line, row in islice(rows, max(0, start), count):
                    yield number, line, row
            start -= count


def _wanted_rows(sources: Sequence[Source], documents: str | None) -> list[int]:
    """How many of the rows of each file are read."""
    counts = []
    left: dict[int, int] = {}
    for source in sources:
        count = count_rows(source.path, documents, source.layout)
        if source.limit is not None:
            count = min(count, left.setdefault(source.number, source.limit))
            left[source.number] -= count
        counts.append(count)
    warn_of_fewer(sources, left)
    return counts


def count_rows(path: Path, documents: str | None = None, layout: Layout | None = None) -> int:
    """How many rows :func:`whole_rows` yields, most of them counted without being decoded."""
    if path.name.endswith(".parquet") and (documents or parts_of(path, layout) is None):
        import pyarrow
        from pyarrow import parquet

        try:
            return parquet.ParquetFile(path).metadata.num_rows
        except pyarrow.ArrowException as error:
            raise ValueError(
                f"{path}: not a readable parquet file ({str(error).splitlines()[0]})"
            ) from error
    return sum(1 for _ in whole_rows(path, documents, layout))


def rows_of_a_chunk(documents: str | None) -> int:
    return CHUNK_PIECES if documents == "file" else CHUNK_ROWS


def plan_bins(total: int, bins: int, evaluation: bool = False, split: bool = False) -> list[Bin]:
    """``bins`` runs of rows whose sizes differ by one at most."""
    ends = [round(total * number / bins) for number in range(bins + 1)]
    return [
        Bin(number, ends[number], ends[number + 1], evaluation, split) for number in range(bins)
    ]


class EvaluationShare:
    """Which rows are kept for evaluation: decided by seed and position alone.

    Up to EXACT_ROWS rows exactly ``ratio`` of them, at least one; of more, each with that
    probability.
    """

    def __init__(self, ratio: float, total: int, seed: int):
        self.seed = seed
        self.highest = np.uint64(int(ratio * (1 << 64)))
        if total <= EXACT_ROWS:
            last = min(max(1, round(ratio * total)), total) - 1
            self.highest = np.partition(self._keys(0, total), last)[last]

    def chosen(self, start: int, end: int) -> np.ndarray:
        """(end - start,) bool."""
        return self._keys(start, end) <= self.highest

    def _keys(self, start: int, end: int) -> np.ndarray:
        # splitmix64 (Steele, Lea and Flood 2014): for one seed no two positions share a key.
        offset = self.seed * 0xD1342543DE82EF95 % (1 << 64)
        keys = np.arange(start + 1, end + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        keys += np.uint64(offset)
        keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return keys ^ (keys >> np.uint64(31))


@dataclass(frozen=True)
class Selection:
    """Which rows of a bin are taken, and where to."""

    samples: int
    seed: int
    share: EvaluationShare | None = None
    dropped: Dropped | None = None

    def shard_of_each(self, bin: Bin) -> Iterator[str | None]:
        """The shard of each row of ``bin``, None for a row that is not drawn."""
        positions = range(bin.start, bin.end)
        sample = positions
        if self.samples >= 0 and not bin.evaluation:  # every row of an evaluation file is taken
            draw = random.Random(f"{self.seed}/{bin.number}")
            sample = set(draw.sample(positions, min(self.samples, len(positions))))
        shards = bin.shards
        chosen = self.share.chosen(bin.start, bin.end).tolist() if bin.split else repeat(False)
        for position, evaluation in zip(positions, chosen, strict=False):
            yield shards[evaluation] if position in sample else None


def tasks(files: Files, bins: list[Bin], selection: Selection) -> Iterator[Task]:
    """The chunks of ``bins`` (in rising order) and, after those of each bin, a task without
    rows."""
    position = bins[0].start if bins else 0
    rows = files.rows(position)
    most = rows_of_a_chunk(files.documents)
    for bin in bins:
        next(islice(rows, bin.start - position, bin.start - position), None)
        chunks: dict[str, Chunk] = {shard: [] for shard in bin.shards}
        seen = dict.fromkeys(chunks, 0)
        # The shards come first: zip takes a row only once it has a shard for it.
        for shard, row in zip(selection.shard_of_each(bin), rows, strict=False):
            if shard is None:
                continue
            if selection.dropped and (error := selection.dropped(shard, seen[shard])):
                row = (*row[:2], error)
            seen[shard] += 1
            chunks[shard].append(row)
            if len(chunks[shard]) == most:
                yield Task(bin, shard, chunks[shard])
                chunks[shard] = []
        yield from (Task(bin, shard, chunk) for shard, chunk in chunks.items() if chunk)
        yield Task(bin, "", None)
        position = bin.end


@dataclass
class ShardPlan:
    """All source rows and the shards they are meant for. ``evaluation``: the files that are for the
    evaluation split alone."""

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
    ) -> "ShardPlan":
        """``num_bins`` shards of each split; evaluation files of fewer rows give a shard a row."""
        bins = plan_bins(train.total, num_bins, split=eval_ratio > 0)
        if evaluation is not None:
            rows = evaluation.total
            bins += plan_bins(rows, min(num_bins, max(1, rows)), evaluation=True)
        share = EvaluationShare(eval_ratio, train.total, seed) if eval_ratio else None
        return cls(train, evaluation, Selection(num_samples_per_bin, seed, share), bins)

    @property
    def expected(self) -> int:
        """How many rows will be read."""
        sizes = [bin.end - bin.start for bin in self.bins if not bin.evaluation]
        samples = self.selection.samples
        train = sum(sizes if samples < 0 else (min(samples, size) for size in sizes))
        return train + (self.evaluation.total if self.evaluation else 0)

    def tasks(self, bins: list[Bin], selection: Selection) -> Iterator[Task]:
        """The chunks of ``bins``, training files first."""
        for evaluation, part in groupby(bins, key=lambda bin: bin.evaluation):
            yield from tasks(self.evaluation if evaluation else self.train, list(part), selection)
