"""In which order a stream reads its source rows: a function of seed, epoch and files alone, so that
a position in it is all that a resumed run needs.

In an epoch the files come in a drawn order, and their rows are shuffled within blocks of
``buffer`` rows, whose borders are others in each epoch. Blocks rather than a reservoir: to go on in
the middle, one block is read again and nothing before it decoded, and no row stays behind.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from coati.dataset.prepare.shard_plan import Chunk, Row
from coati.dataset.stream.row_sources import RowSource

# Rows that are tokenized at a time, fewer where they are long.
CHUNK_ROWS = 32
CHUNK_BYTES = 1 << 20
# Keep the draws of files, blocks and mixtures apart.
_FILES, _BLOCK, _FIRST, _MIXTURE = range(0x73747200, 0x73747204)
_DRAWN_AT_ONCE = 1024


@dataclass(frozen=True)
class Position:
    """A place between two source rows. ``at``: of each stream its epoch and the rows read in it;
    ``drawn``: rows read from all of them since the run began."""

    at: tuple[tuple[int, int], ...]
    drawn: int = 0

    @property
    def epoch(self) -> int:
        """How often every stream was read to its end."""
        return min(epoch for epoch, _ in self.at)


@dataclass(frozen=True)
class SourceChunk:
    """Consecutive rows, ``after`` them the position; none where only an epoch ``ends``."""

    rows: Chunk
    after: Position
    ends: bool = False


class SourceOrder:
    """The rows of one stream, epoch by epoch.

    Args:
        sources: its files; ``first`` is the number of the first of them among those of all streams.
        number: of the stream among all.
        buffer: rows of a block that is shuffled, which are held in memory; 0: rows in the order of
            the files.
        counts: rows of the files that were read to their end, by number; they are skipped whole.
    """

    def __init__(
        self,
        sources: Sequence[RowSource],
        *,
        seed: int,
        buffer: int,
        first: int = 0,
        number: int = 0,
        counts: dict[int, int] | None = None,
    ) -> None:
        self.sources = sources
        self.seed = seed
        self.buffer = buffer
        self.first = first
        self.number = number
        self.counts: dict[int, int] = {} if counts is None else counts

    def rows(self, epoch: int, start: int = 0) -> Iterator[Row]:
        """The rows of ``epoch`` from its ``start``-th on."""
        if not self.buffer:
            yield from self._raw(epoch, start)
            return
        size = self._first_block(epoch)
        block = begin = 0
        if start >= size:
            block = 1 + (start - size) // self.buffer
            begin = size + (block - 1) * self.buffer
            size = self.buffer
        raw = self._raw(epoch, begin)
        skipped = start - begin
        while held := list(islice(raw, size)):
            order = self._random(_BLOCK, epoch, block).permutation(len(held)).tolist()
            for place in order[skipped:]:
                row = held[place]
                held[place] = None  # the next block is read while this list is still there
                yield row
            block += 1
            size = self.buffer
            skipped = 0

    def _first_block(self, epoch: int) -> int:
        # Of data that fit into one block, the first epoch is shuffled as a whole.
        if epoch == 0:
            return self.buffer
        return int(self._random(_FIRST, epoch).integers(self.buffer // 2 + 1, self.buffer + 1))

    def _raw(self, epoch: int, skipped: int) -> Iterator[Row]:
        """The rows in the order of the files, without the first ``skipped``, undecoded."""
        for place in self._files(epoch):
            number = self.first + place
            known = self.counts.get(number)
            if known is not None and known <= skipped:
                skipped -= known
                continue
            read = 0
            for read, (line, row) in enumerate(self.sources[place].rows(), 1):
                if read > skipped:
                    yield number, line, row
            self.counts[number] = read
            skipped = max(0, skipped - read)

    def _files(self, epoch: int) -> list[int]:
        if not self.buffer:
            return list(range(len(self.sources)))
        return self._random(_FILES, epoch).permutation(len(self.sources)).tolist()

    def _random(self, *what: int) -> np.random.Generator:
        return np.random.default_rng([what[0], self.seed, self.number, *what[1:]])


class SourceRows:
    """The streams of a run as one endless sequence of chunks.

    Args:
        weights: how often a row is drawn from each stream, relative to the others. A stream that is
            read to its end begins again; an epoch ends when all of them have.
    """

    def __init__(self, orders: Sequence[SourceOrder], weights: Sequence[float], seed: int) -> None:
        self.orders = orders
        self.seed = seed
        self._ends = np.cumsum(weights) / np.sum(weights)
        self._drawn: tuple[int, list[int]] = (-1, [])
        self.beginning = Position(((0, 0),) * len(orders))

    def chunks(self, position: Position) -> Iterator[SourceChunk]:
        """From ``position`` on; where an epoch ends there is a chunk without rows. Raises
        ValueError for a stream that holds no row."""
        at = [list(pair) for pair in position.at]
        reading = [order.rows(*pair) for order, pair in zip(self.orders, position.at, strict=True)]
        epoch = position.epoch
        drawn = position.drawn
        rows: Chunk = []
        held = 0
        while True:
            which = self._stream(drawn)
            row = next(reading[which], None)
            if row is not None:
                rows.append(row)
                held += len(row[2]) if isinstance(row[2], bytes | str) else 0
                at[which][1] += 1
                drawn += 1
                if len(rows) == CHUNK_ROWS or held >= CHUNK_BYTES:
                    yield SourceChunk(rows, _position(at, drawn))
                    rows = []
                    held = 0
                continue
            self._check_any(which, at[which])
            here = _position(at, drawn)
            at[which] = [at[which][0] + 1, 0]
            reading[which] = self.orders[which].rows(at[which][0])
            behind = _position(at, drawn)
            if behind.epoch > epoch:
                if rows:
                    yield SourceChunk(rows, here)
                    rows = []
                    held = 0
                yield SourceChunk([], behind, ends=True)
                epoch = behind.epoch

    def _stream(self, drawn: int) -> int:
        """The stream of the ``drawn``-th row."""
        if len(self.orders) == 1:
            return 0
        block, place = divmod(drawn, _DRAWN_AT_ONCE)
        if self._drawn[0] != block:
            random = np.random.default_rng([_MIXTURE, self.seed, block])
            chosen = np.searchsorted(self._ends, random.random(_DRAWN_AT_ONCE), side="right")
            self._drawn = (block, np.minimum(chosen, len(self.orders) - 1).tolist())
        return self._drawn[1][place]

    def _check_any(self, which: int, at: list[int]) -> None:
        if at[1] == 0:
            names = ", ".join(source.name for source in self.orders[which].sources[:3])
            raise ValueError(
                f"--dataset {names}: no rows found; expected one JSON object per line, an array, "
                "or records under a header"
            )


def _position(at: list[list[int]], drawn: int) -> Position:
    return Position(tuple((epoch, row) for epoch, row in at), drawn)


def from_state(state: dict[str, Any], fresh: Position) -> Position:
    """The position of a checkpoint; ``fresh`` where it holds none."""
    if "at" not in state:
        return fresh
    at = tuple((int(epoch), int(row)) for epoch, row in state["at"])
    return replace(fresh, at=at, drawn=int(state["drawn"]))
