"""Source rows to windows of training rows, tokenized while the run trains.

A window is some :data:`WINDOW` training rows, fewer where they are long, in the order of the
stream, within which rows of like length are batched together, or packed. It ends where a chunk of
source rows ends, and with an epoch, so its place in the stream is one between two source rows.
"""

import queue
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from coati.dataset.load.epoch_order import ordered_entries
from coati.dataset.prepare.shard_plan import Chunk
from coati.dataset.prepare.validation import BadRowBudget, check_not_empty
from coati.dataset.prepare.workers import StandingPool
from coati.dataset.prepare.write_pass import TokenizeWorker
from coati.dataset.report.report import build_report, dropped_lines
from coati.dataset.report.row_stats import RowStats
from coati.dataset.rows.row_errors import REASONS
from coati.dataset.stream.source_order import Position, SourceRows, from_state
from coati.dataset.types.data_type import Columns
from coati.utils.logging import get_logger
from coati.utils.phases import phase

logger = get_logger(__name__)

WINDOW = 1024  # training rows
WINDOW_TOKENS = 1 << 22
FIRST_ROWS = 1000  # of which the budget of malformed rows is a share before as many are read
COUNTS = ("read", "kept", "written")


@dataclass(frozen=True)
class StreamOptions:
    """``shuffle``: whether rows are grouped by length, in random order, or stay in the order of
    their files. ``pack_length``: tokens of a pack; None: no packing. ``ahead``: windows that are
    made before they are asked for."""

    type: str
    max_length: int
    seed: int
    shuffle: bool
    pack_length: int | None = None
    num_proc: int = 0
    ahead: int = 2


@dataclass(frozen=True)
class Window:
    """``state``: of the stream where it begins, for checkpoints. ``places``: the file and line of
    each row; ``entries``: indices of rows, or arrays of them for packs, in the order of training;
    ``epoch``: of its rows, ``next_epoch``: of the ones behind it."""

    state: dict[str, Any]
    epoch: int
    next_epoch: int
    rows: list[Columns]
    places: list[str]
    entries: Sequence[Any]


class StreamWorker:
    """Tokenizes one chunk: the training rows of each source row, without the columns that are for
    people to read, and statistics. ``others``: what tokenizes files of another type, by number."""

    def __init__(self, tokenize: TokenizeWorker, others: dict[int, TokenizeWorker]) -> None:
        self.tokenize = tokenize
        self.others = others

    def run(self, chunk: Chunk, evaluation: bool) -> tuple[list[list[Columns]], RowStats]:
        made: list[list[Columns]] = []
        stats = RowStats()
        for worker, rows in groupby(chunk, lambda row: self.others.get(row[0], self.tokenize)):
            found, counted = worker.training_rows(list(rows), evaluation)
            made += found
            stats.merge(counted)
        return [[_compact(row) for row in of_source] for of_source in made], stats


def _compact(row: Columns) -> Columns:
    kept = {name: value for name, value in row.items() if not name.endswith("_decode")}
    return {
        name: _array(value) if isinstance(value, list) else value for name, value in kept.items()
    }


def _array(values: list) -> np.ndarray:
    found = np.asarray(values)
    return found.astype(np.int32) if found.dtype.kind == "i" else found


def as_lists(row: Columns) -> Columns:
    """A row of a window as collators take it."""
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in row.items()
    }


@dataclass
class EpochCounts:
    """What became of the source rows of the current epoch; ``before``: of those that a resumed run
    does not read again."""

    stats: RowStats = field(default_factory=RowStats)
    before: Counter = field(default_factory=Counter)
    dropped_before: Counter = field(default_factory=Counter)

    @classmethod
    def of(cls, state: dict[str, Any]) -> "EpochCounts":
        before = Counter({name: state.get(name, 0) for name in COUNTS})
        return cls(before=before, dropped_before=Counter(state.get("dropped", {})))

    def state(self) -> dict[str, Any]:
        stats = self.stats
        now = Counter(
            read=stats.read.total(), kept=stats.kept.total(), written=stats.lengths.total()
        )
        total = now + self.before
        dropped = self.dropped_before + stats.dropped
        return {name: total[name] for name in COUNTS} | {"dropped": dict(dropped)}

    def dropped(self) -> dict[str, dict]:
        """As in a report."""
        none = ["(before the run was resumed)"]
        return {
            reason: {
                "rows": rows,
                "meaning": REASONS[reason],
                "first": self.stats.first.get(reason, none),
            }
            for reason, rows in self.state()["dropped"].items()
        }


class RowStream:
    """The windows of a run, from where a checkpoint left off.

    Args:
        source: the source rows.
        worker: what makes training rows of them; ``options.num_proc`` processes run it, 0: this
            one, when a window is asked for. ``others``: for files of another type, by number.
        budget: ends the run when more of the rows are malformed.
        state: of a :class:`Window` of the run that is resumed; {} begins at the first row.

    Raises (from :meth:`windows`):
        ValueError: for too many malformed rows, an epoch without a row to train on, or a file that
            is not what it was.
    """

    def __init__(
        self,
        source: SourceRows,
        worker: TokenizeWorker,
        options: StreamOptions,
        budget: BadRowBudget,
        state: dict[str, Any] | None = None,
        others: dict[int, TokenizeWorker] | None = None,
    ) -> None:
        state = state or {}
        self.source = source
        self.options = options
        self.budget = budget
        self.start = from_state(state, source.beginning)
        self.entry = int(state.get("entry", 0))  # those before it in the first window are trained
        self._first_window = int(state.get("window", 0))
        self._files = worker.files
        self._template = worker.conversation
        self._counts = EpochCounts.of(state)
        self._told: set[str] = set()  # reasons, and columns
        self._said: dict[str, Any] | None = None  # of an epoch
        for order in source.orders:
            order.counts.update({int(number): n for number, n in state.get("counts", {}).items()})
        self._pool = StandingPool(StreamWorker(worker, others or {}), options.num_proc)
        windows = self._make()
        self._windows = _Ahead(windows, options.ahead) if options.num_proc else windows
        self._peeked: Window | None = None

    def peek(self) -> Window:
        """The first window, which :meth:`windows` gives once more."""
        self._peeked = self._peeked or next(self._windows)
        return self._peeked

    def windows(self) -> Iterator[Window]:
        """Without end. To be called once."""
        if self._peeked is not None:
            yield self._peeked
            self._peeked = None
        yield from self._windows

    def close(self) -> None:
        """Stop reading ahead."""
        if isinstance(self._windows, _Ahead):
            self._windows.close()
        self._pool.close()

    def _make(self) -> Iterator[Window]:
        made = _Making(self._first_window, self.start, self._state_at(self.start))
        items = ((chunk, chunk.rows) for chunk in self.source.chunks(self.start))
        for chunk, (of_sources, stats) in self._pool.map(items):
            if chunk.ends:
                self._end_epoch(chunk.after.epoch - 1)
            if made.rows and (chunk.ends or made.is_full()):
                yield self._window(made, made.after.epoch + chunk.ends)
                made = _Making(made.number + 1, made.after, self._state_at(made.after))
            if chunk.ends:
                made = _Making(made.number, chunk.after, self._state_at(chunk.after))
                continue
            made.after = chunk.after
            for (file, line, _), rows in zip(chunk.rows, of_sources, strict=True):
                made.rows += rows
                made.tokens += sum(row["seq_length"] for row in rows)
                made.places += [f"{self._files[file]}:{line}"] * len(rows)
            self._count(stats)

    def _window(self, made: "_Making", next_epoch: int) -> Window:
        options = self.options
        most = options.pack_length
        lengths = np.asarray([row["seq_length"] for row in made.rows], dtype=np.int64)
        lengths = lengths if most is None else np.minimum(lengths, most)
        shuffle = options.shuffle
        entries = ordered_entries(lengths, options.seed, made.number, shuffle, shuffle, most)
        state = made.state | {"window": made.number}
        return Window(state, made.start.epoch, next_epoch, made.rows, made.places, entries)

    def _state_at(self, position: Position) -> dict[str, Any]:
        counts = {str(n): rows for order in self.source.orders for n, rows in order.counts.items()}
        at = [list(place) for place in position.at]
        return {"at": at, "drawn": position.drawn, "counts": counts} | self._counts.state()

    def _count(self, stats: RowStats) -> None:
        counts = self._counts
        for reason in stats.dropped.keys() - self._told:
            logger.warning(
                f"--streaming: the first row that is left out for {reason}: "
                f"{stats.first[reason][0]}; all are counted"
            )
        for name in stats.missing.keys() - self._told:
            logger.warning(
                f"--streaming: {name} holds content that is not read; the first: "
                f"{stats.first_missing[name]}"
            )
        self._told |= stats.dropped.keys() | stats.missing.keys()
        self.budget.check_columns(
            {name: {"first": stats.first_missing[name]} for name in stats.missing}
        )
        counts.stats.merge(stats)
        if stats.dropped:
            read = counts.state()["read"]
            self.budget.check_counts(counts.dropped(), read, max(read, FIRST_ROWS))

    def _end_epoch(self, epoch: int) -> None:
        counts = self._counts.state()
        self.budget.check_counts(self._counts.dropped(), counts["read"], counts["read"])
        if not counts["written"]:
            check_not_empty(self._report(), f"--dataset, from {', '.join(self._files[:5])}")
        if counts != self._said:  # the same in each epoch but the one that a run resumes in
            self._say(f"epoch {epoch} of the stream is read")
        self._said = counts
        self._counts = EpochCounts()

    def finish(self) -> None:
        """Close the stream; say what was read where no epoch has ended."""
        self.close()
        if self._said is None:
            self._say("read so far, some of it ahead of the training")

    def _say(self, what: str) -> None:
        counts = self._counts.state()
        dropped = sum(counts["dropped"].values())
        logger.info(
            f"--streaming: {what}: rows read {counts['read']}, kept {counts['kept']}, dropped "
            f"{dropped}; training rows {counts['written']}"
        )
        for line in dropped_lines(self._counts.dropped()):
            logger.info(line)
        if not self._counts.before["read"]:
            for warning in self._report()["warnings"]:
                logger.warning(warning)

    def _report(self) -> dict[str, Any]:
        """As that of a preparation, of the rows of the current epoch that this process has read."""
        settings = {"type": self.options.type, "max_length": self.options.max_length}
        files = dict(enumerate(self._files))
        return build_report(self._counts.stats, files, [], part="training", **settings)


@dataclass
class _Making:
    """A window that is being filled. ``after``: the position behind its rows."""

    number: int
    start: Position
    state: dict[str, Any]
    rows: list[Columns] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    tokens: int = 0

    def __post_init__(self) -> None:
        self.after = self.start

    def is_full(self) -> bool:
        return len(self.rows) >= WINDOW or self.tokens >= WINDOW_TOKENS


class _Ahead:
    """Runs an iterator in a thread, at most ``size`` items ahead; its errors come out here."""

    def __init__(self, items: Iterator[Window], size: int) -> None:
        self._items = items
        self._ready: queue.Queue = queue.Queue(max(size, 1))
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="row-stream")
        self._thread.start()

    def __iter__(self) -> "_Ahead":
        return self

    def __next__(self) -> Window:
        with phase("waiting for rows of the stream"):
            found = self._ready.get()
        if isinstance(found, BaseException):
            self._ready.put(found)  # for whoever asks again
            raise found
        return found

    def _run(self) -> None:
        try:
            for item in self._items:
                if not self._put(item):
                    return
        except BaseException as error:
            self._put(error)

    def _put(self, item: Any) -> bool:
        while not self._stopped.is_set():
            try:
                self._ready.put(item, timeout=0.2)
            except queue.Full:
                continue
            return True
        return False

    def close(self) -> None:
        self._stopped.set()
        self._thread.join(timeout=5.0)
