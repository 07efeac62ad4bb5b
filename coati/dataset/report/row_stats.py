"""Statistics of what became of source rows: a Recorder in each worker fills a RowStats per chunk,
and the parent merges them in order.

They stay small whatever the number of rows: counts, a few examples and a few sampled rows.
"""

import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from coati.dataset.chat.conversation import Conversation
from coati.dataset.chat.masked_text import Segments, segments, shorten
from coati.dataset.report.writing_systems import main_scripts
from coati.dataset.rows.messages import turn_text
from coati.dataset.rows.row_errors import MALFORMED, RowError
from coati.dataset.rows.source_row import SourceRow, completion_text
from coati.dataset.types.data_type import Columns, DataType

FIRST_FEW = 3
SAMPLES = 3
# Bounds for the names of roles: a wrong column read as roles must not fill the memory.
MOST_ROLES = 20
LONGEST_NAME = 40
# Likewise for the names of columns and fields that were not read.
MOST_COLUMNS = 200
LONGEST_PATH = 80


@dataclass(order=True)
class SampledRow:
    """A row for people to look at: its place, its parts by name, and what else is known of it."""

    order: tuple[int, int]
    at: str = field(compare=False)
    parts: list[tuple[str, Segments]] = field(compare=False)
    notes: dict[str, str] = field(compare=False)


@dataclass
class RowStats:
    """Statistics of some source rows.

    ``read`` and ``kept`` count by number of the file, ``dropped`` by reason (``first``: the first
    few), ``lengths`` counts training rows by length in tokens, ``shapes`` rows by format;
    ``traits`` hold what only some types have (labels, ground truths). Pickled by StagingDir: a
    field that changes makes an interrupted preparation start over.
    """

    read: Counter = field(default_factory=Counter)
    kept: Counter = field(default_factory=Counter)
    dropped: Counter = field(default_factory=Counter)
    first: dict[str, list[str]] = field(default_factory=dict)
    lengths: Counter = field(default_factory=Counter)
    shapes: Counter = field(default_factory=Counter)
    roles: Counter = field(default_factory=Counter)
    scripts: Counter = field(default_factory=Counter)
    traits: Counter = field(default_factory=Counter)
    refused_roles: Counter = field(default_factory=Counter)  # rows dropped for a turn of that role
    # Rows with a column or field that was not read, by its name; and of these the rows in which it
    # held content that is missing now, with the first of them.
    unused: Counter = field(default_factory=Counter)
    missing: Counter = field(default_factory=Counter)
    first_missing: dict[str, str] = field(default_factory=dict)
    tokens: int = 0
    supervised: int = 0
    truncated: int = 0
    ended: int = 0  # training rows whose supervised part ends with a stop sequence
    answers: list[int] = field(default_factory=list)  # checksums of two different responses
    shown: list[SampledRow] = field(default_factory=list)

    def drop(self, error: RowError, where: str) -> None:
        """Count a dropped row."""
        self.dropped[error.reason] += 1
        examples = self.first.setdefault(error.reason, [])
        if len(examples) < FIRST_FEW:
            examples.append(f"{where}: {error.detail}")
        if error.role is not None:
            self._refuse(error.role[:LONGEST_NAME], 1)

    def _refuse(self, role: str, rows: int) -> None:
        full = len(self.refused_roles) > MOST_ROLES and role not in self.refused_roles
        self.refused_roles["others" if full else role] += rows

    def leave_out(self, unused: dict[str, bool], where: str) -> None:
        """Count the columns and fields that one row has and that were not read."""
        for name, carries in unused.items():
            kept = name if len(name) <= LONGEST_PATH else f"{name[: LONGEST_PATH - 3]}..."
            self._count_bounded(self.unused, kept, 1)
            if carries:
                self._miss(kept, 1, where)

    def _miss(self, name: str, rows: int, where: str) -> None:
        counted = self._count_bounded(self.missing, name, rows)
        self.first_missing.setdefault(counted, where)

    @staticmethod
    def _count_bounded(counter: Counter, name: str, rows: int) -> str:
        full = len(counter) > MOST_COLUMNS and name not in counter
        counted = "others" if full else name
        counter[counted] += rows
        return counted

    def malformed(self) -> int:
        return sum(count for reason, count in self.dropped.items() if reason in MALFORMED)

    def merge(self, later: "RowStats") -> None:
        """Add the counts of rows that come after these."""
        for name in ("read", "kept", "dropped", "lengths", "shapes", "roles", "scripts", "traits"):
            getattr(self, name).update(getattr(later, name))
        for reason, examples in later.first.items():
            mine = self.first.setdefault(reason, [])
            mine.extend(examples[: FIRST_FEW - len(mine)])
        for role, rows in later.refused_roles.items():
            self._refuse(role, rows)
        for name, rows in later.unused.items():
            self._count_bounded(self.unused, name, rows)
        for name, rows in later.missing.items():
            self._miss(name, rows, later.first_missing[name])
        for name in ("tokens", "supervised", "truncated", "ended"):
            setattr(self, name, getattr(self, name) + getattr(later, name))
        self.answers = list(dict.fromkeys(self.answers + later.answers))[:2]
        self.shown = draw_samples(self.shown + later.shown)


def draw_samples(rows: list, key: Callable[[Any], Any] | None = None) -> list:
    """The first row and those that come first in their random order (``key``): the same ones
    however the rows were cut into chunks."""
    return [*rows[:1], *sorted(rows[1:], key=key)[: SAMPLES - 1]]


class Recorder:
    """Fills a RowStats with the rows of one chunk; :meth:`close` completes it."""

    def __init__(self, type: DataType, conversation: Conversation):
        self.stats = RowStats()
        self._type = type
        self._decode = conversation.encoder.decode
        eos = conversation.tokenizer.eos_token_id
        self._stops = [*conversation.stop_ids, *([] if eos is None else [[eos]])]
        self._texts: list[str] = []
        # (order, at, row, columns) of rows that may become a SampledRow; rows of a JSON array on
        # one line share their order.
        self._candidates: list[tuple[tuple[int, int, int], str, SourceRow, Columns]] = []

    def keep(
        self, file: int, line: int, where: str, row: SourceRow, made: list[tuple[Columns, bool]]
    ) -> None:
        """Count a source row and the training rows ``(columns, truncated)`` made of it."""
        stats = self.stats
        stats.kept[file] += 1
        stats.truncated += made[-1][1]
        stats.shapes[row.format] += 1
        if row.unused:
            stats.leave_out(row.unused, where)
        spoken = _spoken(row)
        stats.roles.update(role for role, _ in spoken)
        self._texts.append("\n".join(text for _, text in spoken))
        for trait in (*self._type.traits_of(row), *row.notes):
            stats.traits[trait] += 1
        if row.gt_answer is not None:
            stats.traits["gt_answer"] += 1
        if row.unanswered:
            stats.traits["answer left out"] += 1
        for columns, _ in made:
            self._count(columns)
        order = (zlib.crc32(f"{line}/{file}".encode()), line, file)
        self._candidates.append((order, where, row, made[0][0]))
        if len(self._candidates) > 2 * SAMPLES:
            self._candidates = draw_samples(self._candidates, itemgetter(0))

    def _count(self, columns: Columns) -> None:
        stats = self.stats
        stats.lengths[columns["seq_length"]] += 1
        sides = self._type.sides(columns)
        learned = 0
        for side in sides:
            supervised = side.supervised()
            learned += supervised
            stats.tokens += len(side.ids)
            stats.supervised += supervised
            if len(sides) > 1:
                stats.traits[f"{side.name} tokens"] += supervised
        stats.ended += learned > 0 and sides[0].ends_with(self._stops)
        if len(stats.answers) < 2:
            ids = sides[0].ids
            mask = sides[0].mask()
            response = [token for token, kept in zip(ids, mask, strict=True) if kept] or ids
            checksum = zlib.crc32(repr(response).encode())
            stats.answers += [] if checksum in stats.answers else [checksum]

    def close(self) -> RowStats:
        """The statistics, complete with scripts and sampled rows."""
        self.stats.scripts.update(main_scripts(self._texts))
        for (*order, _), at, row, columns in draw_samples(self._candidates, itemgetter(0)):
            parts = [
                (side.name, shorten(segments(side.ids, side.mask(), self._decode)))
                for side in self._type.sides(columns)
            ]
            known = {
                "shape": row.format,
                **self._type.notes_of(row),
                "right answer (gt_answer)": row.gt_answer,
                "margin": row.margin,
                "weight": row.weight,
                "category": row.category,
            }
            notes = {name: str(value) for name, value in known.items() if value is not None}
            self.stats.shown.append(SampledRow(tuple(order), at, parts, notes))
        return self.stats


def _spoken(row: SourceRow) -> list[tuple[str, str]]:
    """``(role, text)`` of every message of a row."""
    spoken = [
        (turn["role"], turn["content"] if len(turn) == 2 else turn_text(turn))
        for turn in (*row.messages, *row.chosen, *row.rejected)
    ]
    if row.completion is not None:
        spoken.append(("assistant", completion_text(row)))
    if row.text is not None:
        spoken.append(("plain text", row.text))
    return spoken
