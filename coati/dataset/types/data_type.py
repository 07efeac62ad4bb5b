"""The base class of a data type: what its training rows hold and how they are made, batched,
described and checked.

Light: ``--type`` is parsed with it, so pyarrow and torch are imported when they are used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    import pyarrow as pa

    from coati.dataset.chat.conversation import Conversation
    from coati.dataset.rows.source_row import SourceRow

Columns = dict[str, Any]
TrainingRows = list[tuple[Columns, bool]]  # (columns, whether the row was cut to max_length)
# What a column may hold: token ids, labels or a mask by token, a flag, or what is there to read.
Kind = Literal["ids", "labels", "mask", "flag", "text", "texts", "count", "number", "weights"]
COMMON: dict[str, Kind] = {"seq_length": "count", "seq_category": "text"}


@dataclass
class Side:
    """One token sequence of a training row: its name within the row, its ids, and one of ``marks``
    per id, which is ``off`` where nothing is supervised."""

    name: str
    ids: list[int]
    marks: list[int]
    off: int = 0

    def supervised(self) -> int:
        return len(self.marks) - self.marks.count(self.off)

    def mask(self) -> list[bool]:
        return [mark != self.off for mark in self.marks]

    def prompt(self) -> list[int]:
        """The ids before the first supervised one."""
        mask = self.mask()
        return self.ids[: mask.index(True)] if True in mask else self.ids

    def end(self) -> int:
        """The position after the last supervised id; 0 where none is."""
        places = reversed(range(len(self.marks)))
        return next((place + 1 for place in places if self.marks[place] != self.off), 0)

    def ends_with(self, stops: list[list[int]]) -> bool:
        """Whether the last supervised run closes with one of ``stops``."""
        last = self.end()
        return any(self.ids[max(0, last - len(stop)) : last] == stop for stop in stops)


@dataclass(frozen=True)
class ReportTexts:
    """What the report says in place of the type's name."""

    title: str
    what: str
    longer: str
    heading: str
    learned: str


class DataType(ABC):
    """A type of data. A new one is a module with a subclass and a line in
    :mod:`coati.dataset.data_types`.

    Attributes:
        name: the value of ``--type``.
        reads: which of :data:`coati.dataset.rows.formats.CONTENTS` it can be made of.
        columns: of a training row, in order, each with what it holds.
        optional_columns: further ones, of preparations in which some row needs them; rows that do
            not are filled up by :meth:`filled`.
        texts: for the report.
        traits: titles of what :meth:`traits_of` counts.
        raw_keys: what only source rows of this type have, to tell rows of mixed files apart.
        responses: what one calls the texts that :meth:`sides` begin with, in messages.
        supervised: whether anything in a row is learned.
        scored: a row says how good its responses are; bad ones are rows like any other.
        every_row_ends: the supervised part of a row closes with a stop sequence.
        is_cut: rows that are too long are cut, else left out.
        leaves_room: the response is still to be generated and must fit behind the row.
        templated: a chat template writes the rows.
        beside: other types whose rows may be trained on in the same run.
    """

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]]
    columns: ClassVar[dict[str, Kind]]
    optional_columns: ClassVar[dict[str, Kind]] = {}
    texts: ClassVar[ReportTexts]
    traits: ClassVar[dict[str, str]] = {}
    raw_keys: ClassVar[tuple[str, ...]] = ()
    responses: ClassVar[str] = "responses"
    supervised: ClassVar[bool] = True
    scored: ClassVar[bool] = False
    every_row_ends: ClassVar[bool] = True
    is_cut: ClassVar[bool] = False
    leaves_room: ClassVar[bool] = False
    templated: ClassVar[bool] = True
    beside: ClassVar[tuple[str, ...]] = ()

    @property
    def token_columns(self) -> tuple[str, ...]:
        """The columns that hold token ids."""
        return self._holding("ids")

    @property
    def needed_columns(self) -> tuple[str, ...]:
        """The columns without which rows cannot be trained on."""
        return self._holding("ids", "labels", "mask", "flag")

    def _holding(self, *kinds: Kind) -> tuple[str, ...]:
        return tuple(name for name, kind in self.columns.items() if kind in kinds)

    @cached_property
    def schema(self) -> pa.Schema:
        """The arrow schema of prepared rows."""
        return self._arrow(self.columns)

    @cached_property
    def whole_schema(self) -> pa.Schema:
        """:attr:`schema` with the optional columns."""
        return self._arrow(self.columns | self.optional_columns)

    @staticmethod
    def _arrow(columns: dict[str, Kind]) -> pa.Schema:
        import pyarrow as pa

        arrow = {
            "ids": pa.list_(pa.int32()),
            "labels": pa.list_(pa.int32()),
            "mask": pa.list_(pa.bool_()),
            "flag": pa.bool_(),
            "text": pa.string(),
            "texts": pa.list_(pa.string()),
            "count": pa.int32(),
            "number": pa.float32(),
            "weights": pa.list_(pa.float32()),
        }
        return pa.schema({name: arrow[kind] for name, kind in columns.items()})

    def needs_optional(self, rows: Iterable[Columns]) -> bool:
        """Whether one of ``rows`` has an optional column."""
        return bool(self.optional_columns) and any(
            name in row for row in rows for name in self.optional_columns
        )

    def filled(self, columns: Columns) -> Columns:
        """A training row with the optional columns: tokens without a weight count whole."""
        ones = {
            name: [1.0] * len(columns[self.token_columns[0]])
            for name in self.optional_columns
            if columns.get(name) is None
        }
        return columns | ones

    @abstractmethod
    def finish(self, row: SourceRow) -> None:
        """Bring ``row`` into the form that :meth:`tokenize` takes. Raises RowError for a row that
        cannot be used for this type."""

    @abstractmethod
    def tokenize(self, row: SourceRow, conversation: Conversation, max_length: int) -> TrainingRows:
        """The training rows of a finished ``row``, mostly one. Raises RowError for a row that does
        not fit into ``max_length`` tokens or that the template cannot write."""

    @abstractmethod
    def sides(self, columns: Columns) -> list[Side]:
        """The token sequences of a training row; the first one's end is checked."""

    @abstractmethod
    def collator(self) -> Callable[..., Any]:
        """The class that makes batches of training rows."""

    def traits_of(self, row: SourceRow) -> Iterable[str]:
        """What is counted of a source row beside its turns."""
        return ()

    def notes_of(self, row: SourceRow) -> dict[str, Any]:
        """What the report shows beside the text of a row."""
        return {}

    def warnings(self, report: dict[str, Any]) -> Iterator[str]:
        """What is odd about a preparation's report, for this type alone."""
        yield from ()
