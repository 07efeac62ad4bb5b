"""The reference's functions that tokenize one row of a data file each.

Every text is encoded once, as a whole, by :class:`Conversation`; what is supervised follows from
the spans it found. Only sft rows are cut to ``max_length``: a cut prompt has no question, a cut
response no end, so those rows are dropped.
"""

from typing import Any

from coati.dataset.chat.conversation import Conversation
from coati.dataset.data_types import DATA_TYPES
from coati.dataset.rows.formats import read_row
from coati.dataset.rows.row_errors import RowError
from coati.dataset.types.data_type import Columns


def tokenize_sft(
    data_point: dict[str, Any],
    tokenizer,
    conversation_template: Conversation,
    max_length: int = 4096,
) -> Columns:
    """One conversation as ``input_ids`` and ``labels`` (-100: no loss), never longer than
    ``max_length`` tokens.

    Keeps the first complete rounds that fit. All columns are None when the row cannot be used
    (``read_row`` and ``DataType.tokenize`` say why). With a template that rewrites earlier turns:
    the row of the last response. ``tokenizer`` must be the template's.
    """
    return _tokenize("sft", data_point, tokenizer, conversation_template, max_length)


def tokenize_prompt(
    data_point: dict[str, Any],
    tokenizer,
    conversation_template: Conversation,
    max_length: int = 4096,
) -> Columns:
    """One prompt as ``input_ids``, generation prompt included; a last response is left out. None as
    in tokenize_sft."""
    return _tokenize("prompt", data_point, tokenizer, conversation_template, max_length)


def tokenize_rlhf(
    data_point: dict[str, Any],
    tokenizer,
    conversation_template: Conversation,
    max_length: int = 4096,
) -> Columns:
    """One preference row as ``chosen_`` and ``rejected_`` ``input_ids`` and ``loss_mask`` (the last
    response of each).

    None as in tokenize_sft.
    """
    return _tokenize("preference", data_point, tokenizer, conversation_template, max_length)


def tokenize_kto(
    data_point: dict[str, Any],
    tokenizer,
    conversation_template: Conversation,
    max_length: int = 4096,
) -> Columns:
    """One judged response as the ids of ``prompt`` and ``completion`` and its ``label``. None as in
    tokenize_sft."""
    return _tokenize("kto", data_point, tokenizer, conversation_template, max_length)


def _tokenize(
    type: str, data_point: Any, tokenizer, conversation: Conversation, max_length: int
) -> Columns:
    if tokenizer is not conversation.tokenizer:
        raise ValueError(
            "tokenizer: conversation_template was made for another tokenizer; make it with this "
            "one (setup_conversation_template)"
        )
    try:
        made = DATA_TYPES[type].tokenize(read_row(type, data_point), conversation, max_length)
    except RowError:
        return dict.fromkeys(DATA_TYPES[type].columns)
    return made[-1][0]
