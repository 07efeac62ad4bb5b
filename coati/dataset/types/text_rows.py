"""Documents for continued pre-training, cut into rows without losing a token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from coati.dataset.rows.row_errors import RowError
from coati.dataset.types.data_type import (
    COMMON,
    Columns,
    DataType,
    ReportTexts,
    Side,
    TrainingRows,
)
from coati.utils.constants import IGNORE_INDEX

if TYPE_CHECKING:
    from coati.dataset.chat.conversation import Conversation
    from coati.dataset.rows.source_row import SourceRow

# What corpora put between documents in one file. Here it is text like any other.
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
SEPARATED = "separators in the text"


class Text(DataType):
    """A document is one row after the other of at most ``max_length`` tokens, the last one closed
    by eos: each token of it stands in exactly one row. ``document``: it begins with this row."""

    name = "text"
    reads = ("text", "document")
    columns = {
        "input_ids": "ids",
        "labels": "labels",
        "document": "flag",
        "inputs_decode": "text",
        **COMMON,
    }
    texts = ReportTexts(
        title="documents for continued pre-training (text)",
        what="The model is trained on every token of each.",
        longer="a longer document becomes several rows and loses nothing.",
        heading="What the model is trained on",
        learned="The loss covers all but the first token of a row, which nothing precedes.",
    )
    traits = {
        "documents": "documents",
        SEPARATED: f"texts with a separator such as {SEPARATORS[0]} in them",
    }
    responses = "texts"
    every_row_ends = False
    is_cut = True
    templated = False
    beside = ("sft",)

    def finish(self, row: SourceRow) -> None:
        if row.text is None or (row.begins and not row.text.strip()):
            raise RowError("empty_conversation", "there is no text")

    def tokenize(self, row: SourceRow, conversation: Conversation, max_length: int) -> TrainingRows:
        from coati.dataset.chat.plain_text import encode_document

        encoder = conversation.encoder
        text = row.text or ""
        ids = encode_document(conversation.tokenizer, encoder, text, row.begins, row.ends)
        rows = []
        for start, end in pieces(len(ids), max_length):
            part = ids[start:end]
            columns = {
                "input_ids": part,
                "labels": [IGNORE_INDEX, *part[1:]],
                "document": row.begins and start == 0,
                "inputs_decode": encoder.decode(part),
                "seq_length": len(part),
                "seq_category": row.category,
            }
            rows.append((columns, False))
        return rows

    def sides(self, columns: Columns) -> list[Side]:
        return [Side("", columns["input_ids"], columns["labels"], IGNORE_INDEX)]

    def collator(self) -> Callable[..., Any]:
        from coati.dataset.load.collator import DataCollatorForSupervisedDataset

        return DataCollatorForSupervisedDataset

    def traits_of(self, row: SourceRow) -> Iterable[str]:
        if row.ends:
            yield "documents"
        if any(mark in (row.text or "") for mark in SEPARATORS):
            yield SEPARATED

    def warnings(self, report: dict[str, Any]) -> Iterator[str]:
        if found := report["traits"].get(SEPARATED):
            yield (
                f"texts with {', '.join(SEPARATORS[:-1])} or {SEPARATORS[-1]} in them: {found}; it "
                "is read as text, not as the end of a document: write one document per row of a "
                "jsonl file, or a blank line in its place and --documents paragraph"
            )


def pieces(length: int, most: int) -> Iterator[tuple[int, int]]:
    """``(start, end)`` of pieces of at most ``most`` that make up ``length``. Of two last ones of
    which the second would be a single token, from which nothing is learned, the first gives one."""
    start = 0
    while start < length:
        end = min(start + most, length)
        if length - end == 1 and end - start > 2:
            end -= 1
        yield start, end
        start = end
