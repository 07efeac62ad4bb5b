"""Conversations whose responses are learned, and plain texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from coati.dataset.rows.messages import complete_rounds
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
    from coati.dataset.chat.encoded import Encoded
    from coati.dataset.rows.source_row import SourceRow


class Sft(DataType):
    """Rows are cut to the complete rounds that fit into ``max_length``."""

    name = "sft"
    reads = ("conversation", "text")
    columns = {
        "input_ids": "ids",
        "labels": "labels",
        "inputs_decode": "text",
        "labels_decode": "texts",
        **COMMON,
    }
    optional_columns = {"loss_weights": "weights"}
    texts = ReportTexts(
        title="conversations for supervised fine-tuning (sft)",
        what="In each, the model is trained on the responses of the assistant.",
        longer="a longer conversation keeps the whole rounds that fit, and is dropped when not "
        "even one does.",
        heading="What the model is trained on",
        learned="The loss covers the text marked green; the rest is context.",
    )
    is_cut = True

    def finish(self, row: SourceRow) -> None:
        if row.text is None:
            row.messages = complete_rounds(row.messages)
        elif not row.text.strip():
            raise RowError("empty_conversation", "source and Target hold no text")

    def tokenize(self, row: SourceRow, conversation: Conversation, max_length: int) -> TrainingRows:
        """One row, or one per response (see Conversation.encode_turns)."""
        if row.text is not None:
            return [_text_row(row, conversation, max_length)]
        encoded = conversation.encode_turns(row.messages, max_length, row.tools)
        row.notes = encoded[-1].notes
        return [(_columns(one, conversation, row.category), one.truncated) for one in encoded]

    def sides(self, columns: Columns) -> list[Side]:
        return [Side("", columns["input_ids"], columns["labels"], IGNORE_INDEX)]

    def collator(self) -> Callable[..., Any]:
        from coati.dataset.load.collator import DataCollatorForSupervisedDataset

        return DataCollatorForSupervisedDataset


def _columns(encoded: Encoded, conversation: Conversation, category: str | None) -> Columns:
    # What follows the last response (a line break, say) is never trained and would only cost time.
    end = encoded.spans[-1][1]
    ids = encoded.input_ids[:end]
    decode = conversation.encoder.decode
    columns = {
        "input_ids": ids,
        "labels": _labels(encoded, ids),
        "inputs_decode": encoded.decoded(decode),
        "labels_decode": encoded.decoded_responses(decode),
        "seq_length": len(ids),
        "seq_category": category,
    }
    if encoded.weights and any(0 < weight < 1 for weight in encoded.weights[:end]):
        columns["loss_weights"] = _loss_weights(encoded, end)
    return columns


def _labels(encoded: Encoded, ids: list[int]) -> list[int]:
    labels = [IGNORE_INDEX] * len(ids)
    for start, stop in encoded.spans:
        labels[start:stop] = ids[start:stop]
    if encoded.weights:
        for place, weight in enumerate(encoded.weights[: len(ids)]):
            if weight <= 0:
                labels[place] = IGNORE_INDEX
    return labels


def _loss_weights(encoded: Encoded, end: int) -> list[float]:
    """1 outside of responses, so that what a run supervises beside them counts whole."""
    weights = [1.0] * end
    for start, stop in encoded.spans:
        weights[start:stop] = encoded.weights[start:stop]
    return weights


def _text_row(row: SourceRow, conversation: Conversation, max_length: int) -> tuple[Columns, bool]:
    """Plain text: no template; every token of it and the eos after it is learned. Too long a text
    loses its end."""
    ids, prefix = conversation.encode_text(row.text)
    kept = ids[:max_length]
    decode = conversation.encoder.decode
    columns = {
        "input_ids": kept,
        "labels": [IGNORE_INDEX] * prefix + kept[prefix:],
        "inputs_decode": decode(kept),
        "labels_decode": [decode(kept[prefix:])],
        "seq_length": len(kept),
        "seq_category": row.category,
    }
    return columns, len(kept) < len(ids)
