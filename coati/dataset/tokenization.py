"""Rows of a data file to rows a trainer reads; one function per data type, entered in :data:`TOKENIZERS`."""

from collections.abc import Callable
from typing import Any

from coati.dataset.conversation import Conversation, Encoded
from coati.dataset.reasons import RowError
from coati.dataset.sources import SourceRow, read_sft

IGNORE_INDEX = -100
SFT_COLUMNS = ("input_ids", "labels", "inputs_decode", "labels_decode", "seq_length", "seq_category")


def sft_rows(row: SourceRow, conversation: Conversation, max_length: int) -> list[tuple[dict[str, Any], bool]]:
    """``(training row, truncated)`` for each row that ``row`` gives: one, or one per answer (see encode_turns)."""
    encoded = conversation.encode_turns(row.messages, max_length)
    return [(_sft_columns(one, conversation, row.category), one.truncated) for one in encoded]


def _sft_columns(encoded: Encoded, conversation: Conversation, category: str | None) -> dict[str, Any]:
    # What follows the last answer (a line break, say) is never trained and would only cost time.
    end = encoded.spans[-1][1]
    ids = encoded.input_ids[:end]
    labels = [token if kept else IGNORE_INDEX for token, kept in zip(ids, encoded.loss_mask, strict=False)]
    return {
        "input_ids": ids,
        "labels": labels,
        "inputs_decode": conversation.encoder.decode(ids),
        "labels_decode": [conversation.encoder.decode(answer) for answer in encoded.answers()],
        "seq_length": len(ids),
        "seq_category": category,
    }


def tokenize_sft(
    data_point: dict[str, Any], tokenizer, conversation_template: Conversation, max_length: int = 4096
) -> dict[str, Any]:
    """One conversation as ``input_ids`` and ``labels`` (-100: no loss), never longer than ``max_length`` tokens.

    Keeps the first complete rounds that fit. All columns are None when the row cannot be used (``sft_rows`` says why).
    With a template that rewrites earlier turns: the row of the last answer. ``tokenizer`` must be the template's.
    """
    if tokenizer is not conversation_template.tokenizer:
        raise ValueError("tokenize_sft: conversation_template was made for another tokenizer; make it with this one")
    try:
        return sft_rows(read_sft(data_point), conversation_template, max_length)[-1][0]
    except RowError:
        return dict.fromkeys(SFT_COLUMNS)


TOKENIZERS: dict[str, Callable[[SourceRow, Conversation, int], list[tuple[dict[str, Any], bool]]]] = {"sft": sft_rows}
