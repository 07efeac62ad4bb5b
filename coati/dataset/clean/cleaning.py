"""The settings of cleaning, and the checks that look at one row alone."""

import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from coati.dataset.clean.overlap import Overlap
from coati.dataset.clean.text_normalization import normalize
from coati.dataset.rows.messages import turn_text
from coati.dataset.rows.row_errors import DEFAULT_OVERLAP_WORDS, RowError
from coati.dataset.rows.source_row import SourceRow, completion_text


@dataclass(frozen=True)
class Cleaning:
    """Which rows are dropped although they could be trained on. Raises ValueError for values that
    cannot work.

    Attributes:
        deduplicate: rows whose text is that of an earlier one, up to case, width and white space.
        near_duplicates: rows whose word trigrams have at least this Jaccard similarity with those
            of an earlier one.
        drop_eval_overlap: training rows that share ``overlap_words`` consecutive words with an
            evaluation row.
        benchmark_files: likewise with any text in these files.
        min_answer_chars, max_answer_chars: bounds for the characters of a response (sft: of all
            responses together).
        drop_trivial_answers: responses without a visible character, or that only repeat the prompt.
    """

    deduplicate: bool = False
    near_duplicates: float | None = None
    drop_eval_overlap: bool = False
    benchmark_files: Sequence[str] = ()
    overlap_words: int = DEFAULT_OVERLAP_WORDS
    min_answer_chars: int = 0
    max_answer_chars: int | None = None
    drop_trivial_answers: bool = False

    def __post_init__(self):
        object.__setattr__(self, "benchmark_files", tuple(self.benchmark_files))
        if self.near_duplicates is not None and not 0 < self.near_duplicates < 1:
            raise ValueError(
                f"near_duplicates must lie between 0 and 1, found {self.near_duplicates}"
            )
        if self.overlap_words < 2:
            raise ValueError(f"overlap_words must be at least 2, found {self.overlap_words}")
        if self.max_answer_chars is not None and self.max_answer_chars < self.min_answer_chars:
            raise ValueError(
                f"max_answer_chars {self.max_answer_chars} is below min_answer_chars "
                f"{self.min_answer_chars}: no response fits between them"
            )

    def named(self) -> dict[str, Any]:
        """The settings that differ from the default, by name; empty when nothing is cleaned."""
        asked = {
            name: value for name, value in asdict(self).items() if value != getattr(Cleaning, name)
        }
        if self.drop_eval_overlap or self.benchmark_files:
            asked["overlap_words"] = self.overlap_words
        return asked

    @property
    def compares_all(self) -> bool:
        """Whether all rows, not only those for evaluation, must be hashed before."""
        return self.deduplicate or self.near_duplicates is not None


def check_row(row: SourceRow, cleaning: Cleaning, overlap: Overlap | None = None) -> None:
    """Raise RowError when ``row`` is to be dropped. ``overlap``: the n-grams that it must not
    contain."""
    if cleaning.min_answer_chars or cleaning.max_answer_chars is not None:
        _check_length(row, cleaning.min_answer_chars, cleaning.max_answer_chars)
    if cleaning.drop_trivial_answers:
        _check_trivial(row)
    if overlap is not None:
        overlap.check(row)


def _check_length(row: SourceRow, low: int, high: int | None) -> None:
    for responses in _response_groups(row):
        length = sum(len(response.strip()) for response in responses)
        if length < low:
            raise RowError("answer_too_short", f"{length} characters, at least {low} are wanted")
        if high is not None and length > high:
            raise RowError("answer_too_long", f"{length} characters, at most {high} are wanted")


def _response_groups(row: SourceRow) -> list[list[str]]:
    """What is measured together: all responses of a conversation, or each side of a pair."""
    if row.completion is not None:
        return [[completion_text(row)]]
    if row.text is not None:
        return [[row.text]]
    turns = [row.chosen, row.rejected] if row.chosen else [row.messages]
    groups = [[turn_text(turn) for turn in side if turn["role"] == "assistant"] for side in turns]
    return [group for group in groups if group or row.chosen]


def _check_trivial(row: SourceRow) -> None:
    for prompt, response in _rounds(row):
        normalized = normalize(response)
        if all(unicodedata.category(character)[0] in "ZC" for character in normalized):
            raise RowError("blank_answer", f"found {response[:40]!r}")
        if normalized == normalize(prompt):
            raise RowError("answer_repeats_prompt", f"both are {response[:60]!r}")


def _rounds(row: SourceRow) -> list[tuple[str, str]]:
    """``(prompt, response)`` of every response that may be trained on."""
    texts = [turn_text(turn) for turn in row.messages]
    if row.completion is not None:
        return [(texts[-1], completion_text(row))]
    if row.chosen:
        sides = (
            [*texts, *(turn_text(turn) for turn in side)] for side in (row.chosen, row.rejected)
        )
        return [(side[-2], side[-1]) for side in sides]
    return [
        (texts[k - 1], texts[k])
        for k, turn in enumerate(row.messages)
        if turn["role"] == "assistant"
    ]
