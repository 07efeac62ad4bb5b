"""In which order a stream reads its source rows: a function of seed, epoch and files alone, so that
a position in it is all that a resumed run needs.

In an epoch the files come in a drawn order, and their rows are shuffled within blocks of
``buffer`` rows, fewer where rows are long, whose borders are others in each epoch. Blocks rather
than a reservoir: to go on in the middle, one block is read again and nothing before it decoded, and
no row stays behind.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from coati.dataset.prepare.shard_plan import Chunk, Row
from coati.dataset.stream.row_sources import RowSource

# Rows that are tokenized at a time, fewer where they are long.
CHUNK_ROWS = 32
CHUNK_BYTES = 1 << 20
BLOCK_BYTES = 1 << 28  # of the texts of a block, which are held in memory
# Keep the draws of files, blocks and mixtures apart.
_FILES, _BLOCK, _FIRST, _MIXTURE = range(0x73747200, 0x73747204)
_DRAWN_AT_ONCE = 1024


@dataclass(frozen=True)
class Position:
    """A place between two source rows. ``at``: of each stream its epoch, the rows of it before the
    current block, and the rows read; ``drawn``: rows read from all since the run began."""

    at: tuple[tuple[int, int, int], ...]
    drawn: int = 0

    @property
    def epoch(self) -> int:
        """How often every stream was read to its end."""
        return min(epoch for epoch, _, _ in self.at)


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

    def rows(self, epoch: int, begin: int = 0, start: int = 0) -> Iterator[tuple[int, Row]]:
        """The rows of ``epoch`` from its ``start``-th on, each with the number of rows before its
        block; ``begin``: that of the ``start``-th."""
        if not self.buffer:
            yield from enumerate(self._raw(epoch, start), start + 1)
            return
        raw = self._raw(epoch, begin)
        skipped = start - begin
        while held := self._block(raw, self.buffer if begin else self._first_block(epoch)):
            order = self._random(_BLOCK, epoch, begin).permutation(len(held)).tolist()
            for place in order[skipped:]:
                row = held[place]
                held[place] = None  # the next block is read while this list is still there
                yield begin, row
            begin += len(order)
            skipped = 0

    def _block(self, raw: Iterator[Row], most: int) -> list[Any]:
        held = []
        size = 0
        for row in raw:
            held.append(row)
            size += text_size(row[2])
            if len(held) == most or size >= BLOCK_BYTES:
                break
        return held

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
        self.beginning = Position(((0, 0, 0),) * len(orders))

    def chunks(self, position: Position) -> Iterator[SourceChunk]:
        """From ``position`` on; where an epoch ends there is a chunk without rows. Raises
        ValueError for a stream that holds no row."""
        at = list(position.at)
        reading = [order.rows(*place) for order, place in zip(self.orders, at, strict=True)]
        epoch = position.epoch
        drawn = position.drawn
        rows: Chunk = []
        held = 0
        while True:
            which = self._stream(drawn)
            of, _, read = at[which]
            found = next(reading[which], None)
            if found is not None:
                begin, row = found
                rows.append(row)
                held += text_size(row[2])
                at[which] = (of, begin, read + 1)
                drawn += 1
                if len(rows) == CHUNK_ROWS or held >= CHUNK_BYTES:
                    yield SourceChunk(rows, Position(tuple(at), drawn))
                    rows = []
                    held = 0
                continue
            self._check_any(which, read)
            here = Position(tuple(at), drawn)
            at[which] = (of + 1, 0, 0)
            reading[which] = self.orders[which].rows(of + 1)
            behind = Position(tuple(at), drawn)
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

    def _check_any(self, which: int, read: int) -> None:
        if read == 0:
            names = ", ".join(source.name for source in self.orders[which].sources[:3])
            raise ValueError(
                f"--dataset {names}: no rows found; expected one JSON object per line, an array, "
                "or records under a header"
            )


def text_size(raw: Any) -> int:
    """Bytes or characters of the texts of an undecoded row."""
    if isinstance(raw, bytes | str):
        return len(raw)
    if isinstance(raw, dict):
        return sum(map(text_size, raw.values()))
    return sum(map(text_size, raw)) if isinstance(raw, list) else 0


def from_state(state: dict[str, Any], fresh: Position) -> Position:
    """The position of a checkpoint; ``fresh`` where it holds none."""
    if "at" not in state:
        return fresh
    at = tuple((int(epoch), int(begin), int(row)) for epoch, begin, row in state["at"])
    return replace(fresh, at=at, drawn=int(state["drawn"]))
