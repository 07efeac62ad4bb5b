"""What became of source rows, counted: a Recorder in each worker, its Tally merged in order by the
parent.

A tally stays small whatever the number of rows: counts, a few examples and a few rows to show.
"""

import zlib
from collections import Counter
from dataclasses import dataclass, field

from coati.dataset.chat.conversation import Conversation
from coati.dataset.chat.masked_text import Segments, segments, shorten
from coati.dataset.report.writing_systems import main_scripts
from coati.dataset.rows.input_files import SourceRow
from coati.dataset.rows.row_errors import MALFORMED, RowError
from coati.dataset.types.data_type import Columns, DataType

FIRST_FEW = 3
SHOWN_ROWS = 3
MOST_ROLES, LONGEST_NAME = (
    20,
    40,
)  # a column of something else taken for roles must not fill the memory


@dataclass(order=True)
class Shown:
    """A row to look at: where it stands, its parts by name, and what else is known of it."""

    order: tuple[int, int]
    at: str = field(compare=False)
    parts: list[tuple[str, Segments]] = field(compare=False)
    notes: dict[str, str] = field(compare=False)


@dataclass
class Tally:
    """Counts over some source rows. ``lengths`` counts training rows by their length in tokens; the
    Counters ``read`` and ``kept`` are by number of the file; ``traits`` hold what only some types
    have (labels, ground truths)."""

    read: Counter = field(default_factory=Counter)
    kept: Counter = field(default_factory=Counter)
    dropped: Counter = field(default_factory=Counter)
    first: dict[str, list[str]] = field(default_factory=dict)
    lengths: Counter = field(default_factory=Counter)
    shapes: Counter = field(default_factory=Counter)
    roles: Counter = field(default_factory=Counter)
    scripts: Counter = field(default_factory=Counter)
    traits: Counter = field(default_factory=Counter)
    refused_roles: Counter = field(
        default_factory=Counter
    )  # rows dropped because of a turn of that role
    tokens: int = 0
    supervised: int = 0
    truncated: int = 0
    ended: int = 0  # training rows whose supervised part closes with a stop sequence
    answers: list[int] = field(default_factory=list)  # checksums of the first two different answers
    shown: list[Shown] = field(default_factory=list)

    def drop(self, error: RowError, where: str) -> None:
        self.dropped[error.reason] += 1
        examples = self.first.setdefault(error.reason, [])
        if len(examples) < FIRST_FEW:
            examples.append(f"{where}: {error.detail}")
        if error.role is not None:
            self._refuse(error.role[:LONGEST_NAME], 1)

    def _refuse(self, role: str, rows: int) -> None:
        full = len(self.refused_roles) > MOST_ROLES and role not in self.refused_roles
        self.refused_roles["others" if full else role] += rows

    def malformed(self) -> int:
        return sum(count for reason, count in self.dropped.items() if reason in MALFORMED)

    def merge(self, later: "Tally") -> None:
        """Add the counts of rows that come after these."""
        for name in ("read", "kept", "dropped", "lengths", "shapes", "roles", "scripts", "traits"):
            getattr(self, name).update(getattr(later, name))
        for reason, examples in later.first.items():
            mine = self.first.setdefault(reason, [])
            mine.extend(examples[: FIRST_FEW - len(mine)])
        for role, rows in later.refused_roles.items():
            self._refuse(role, rows)
        for name in ("tokens", "supervised", "truncated", "ended"):
            setattr(self, name, getattr(self, name) + getattr(later, name))
        self.answers = list(dict.fromkeys(self.answers + later.answers))[:2]
        self.shown = choose_shown(self.shown + later.shown)


def choose_shown(rows: list[Shown]) -> list[Shown]:
    """The first row and two that chance picks: the same ones however the rows were cut into
    chunks."""
    if not rows:
        return []
    first = rows[0]
    return [first, *sorted(rows[1:])[: SHOWN_ROWS - 1]]


class Recorder:
    """Fills a Tally with the rows of one chunk; :meth:`close` completes it."""

    def __init__(self, type: DataType, conversation: Conversation):
        self.tally = Tally()
        self._type, self._decode = type, conversation.encoder.decode
        eos = conversation.tokenizer.eos_token_id
        self._stops = [*conversation.stop_ids, *([] if eos is None else [[eos]])]
        self._texts: list[str] = []
        self._candidates: list[tuple[tuple[int, int], str, SourceRow, Columns]] = []

    def keep(
        self, file: int, line: int, where: str, row: SourceRow, made: list[tuple[Columns, bool]]
    ) -> None:
        """Count a source row and the training rows ``(columns, truncated)`` that it gave."""
        tally = self.tally
        tally.kept[file] += 1
        tally.truncated += made[-1][1]
        tally.shapes[row.format] += 1
        spoken = _spoken(row)
        tally.roles.update(role for role, _ in spoken)
        self._texts.append("\n".join(text for _, text in spoken))
        tally.traits.update(self._type.traits_of(row))
        if row.gt_answer is not None:
            tally.traits["gt_answer"] += 1
        if row.unanswered:
            tally.traits["answer left out"] += 1
        for columns, _ in made:
            self._count(columns)
        order = (zlib.crc32(f"{line}/{file}".encode()), line)
        self._candidates.append((order, where, row, made[0][0]))
        if len(self._candidates) > 2 * SHOWN_ROWS:
            self._thin_out()

    def _count(self, columns: Columns) -> None:
        tally = self.tally
        tally.lengths[columns["seq_length"]] += 1
        sides = self._type.sides(columns)
        learned = 0
        for side in sides:
            supervised = side.supervised()
            learned += supervised
            tally.tokens += len(side.ids)
            tally.supervised += supervised
            if len(sides) > 1:
                tally.traits[f"{side.name} tokens"] += supervised
        tally.ended += learned > 0 and sides[0].ends_with(self._stops)
        if len(tally.answers) < 2:
            ids = sides[0].ids
            answer = [
                token for token, kept in zip(ids, sides[0].mask(), strict=True) if kept
            ] or ids
            checksum = zlib.crc32(repr(answer).encode())
            tally.answers += [] if checksum in tally.answers else [checksum]

    def _thin_out(self) -> None:
        first, *others = self._candidates
        self._candidates = [first, *sorted(others, key=lambda one: one[0])[: SHOWN_ROWS - 1]]

    def close(self) -> Tally:
        """The tally, complete with scripts and the rows to show."""
        if self._candidates:
            self._thin_out()
        self.tally.scripts.update(main_scripts(self._texts))
        for order, where, row, columns in self._candidates:
            sides = self._type.sides(columns)
            parts = [
                (side.name, shorten(segments(side.ids, side.mask(), self._decode)))
                for side in sides
            ]
            self.tally.shown.append(Shown(order, where, parts, _notes(self._type, row)))
        return self.tally


def _spoken(row: SourceRow) -> list[tuple[str, str]]:
    """``(role, text)`` of all that is said in a row."""
    spoken = [
        (turn["role"], turn["content"]) for turn in (*row.messages, *row.chosen, *row.rejected)
    ]
    if row.completion:
        spoken.append(("assistant", row.completion))
    if row.text is not None:
        spoken.append(("plain text", row.text))
    return spoken


def _notes(type: DataType, row: SourceRow) -> dict[str, str]:
    """What a reader wants to know of a row beside its text."""
    known = {
        "format": row.format,
        **type.notes_of(row),
        "right answer (gt_answer)": row.gt_answer,
        "margin": row.margin,
    }
    return {
        name: str(value)
        for name, value in (known | {"category": row.category}).items()
        if value is not None
    }
