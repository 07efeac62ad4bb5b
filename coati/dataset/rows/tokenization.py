"""Rows of a data file to rows a trainer reads; one function per data type, entered in
:data:`TOKENIZERS`.

Every text is encoded once, as a whole, by :class:`Conversation`; what is supervised follows from
the spans it found. Only sft rows are cut to ``max_length``: a cut prompt has no question, a cut
answer no end, so those rows are dropped.
"""

from collections.abc import Callable
from typing import Any

from coati.dataset.chat.conversation import Conversation, Encoded
from coati.dataset.rows.formats import READERS, SourceRow
from coati.dataset.rows.row_errors import RowError

IGNORE_INDEX = -100
Columns = dict[str, Any]
Made = list[tuple[Columns, bool]]  # (training row, whether it was cut to max_length)
_SIDE = ("input_ids", "loss_mask", "label_decode")
COLUMNS = {
    "sft": ("input_ids", "labels", "inputs_decode", "labels_decode", "seq_length", "seq_category"),
    "prompt": ("input_ids", "inputs_decode", "seq_length", "seq_category", "gt_answer"),
    "preference": (
        *(f"chosen_{name}" for name in _SIDE),
        *(f"rejected_{name}" for name in _SIDE),
        *("margin", "seq_length", "seq_category"),
    ),
    "kto": (
        *("prompt", "completion", "label", "input_id_decode", "completion_decode"),
        *("seq_length", "seq_category"),
    ),
}


def sft_rows(row: SourceRow, conversation: Conversation, max_length: int) -> Made:
    """``(training row, truncated)`` for each row that ``row`` gives: one, or one per answer (see
    encode_turns)."""
    if row.text is not None:
        return [_text_columns(row, conversation, max_length)]
    encoded = conversation.encode_turns(row.messages, max_length)
    return [(_sft_columns(one, conversation, row.category), one.truncated) for one in encoded]


def _sft_columns(encoded: Encoded, conversation: Conversation, category: str | None) -> Columns:
    # What follows the last answer (a line break, say) is never trained and would only cost time.
    end = encoded.spans[-1][1]
    ids = encoded.input_ids[:end]
    labels = [
        token if kept else IGNORE_INDEX for token, kept in zip(ids, encoded.loss_mask, strict=False)
    ]
    return {
        "input_ids": ids,
        "labels": labels,
        "inputs_decode": conversation.encoder.decode(ids),
        "labels_decode": [conversation.encoder.decode(answer) for answer in encoded.answers()],
        "seq_length": len(ids),
        "seq_category": category,
    }


def _text_columns(
    row: SourceRow, conversation: Conversation, max_length: int
) -> tuple[Columns, bool]:
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


def prompt_rows(row: SourceRow, conversation: Conversation, max_length: int) -> Made:
    """The ids that generation starts from, and the answer that is right."""
    encoded = conversation.encode_prompt(row.messages)
    ids, bos = encoded.input_ids, conversation.tokenizer.bos_token
    _check_length(len(ids), max_length)
    columns = {
        "input_ids": ids,
        # The ids are those of this text, behind the begin token where the template writes none: no
        # need to decode.
        "inputs_decode": encoded.text
        if bos is None or encoded.text.startswith(bos)
        else bos + encoded.text,
        "seq_length": len(ids),
        "seq_category": row.category,
        "gt_answer": row.gt_answer,
    }
    return [(columns, False)]


def preference_rows(row: SourceRow, conversation: Conversation, max_length: int) -> Made:
    """Both conversations, each whole, with its last answer marked in ``loss_mask``."""
    columns: Columns = {}
    for side, turns in (("chosen", row.chosen), ("rejected", row.rejected)):
        try:
            encoded = conversation.encode_answer([*row.messages, *turns], max_length)
        except RowError as error:
            raise RowError(error.reason, f"{side}: {error.detail}") from error
        columns[f"{side}_input_ids"] = encoded.input_ids
        columns[f"{side}_loss_mask"] = encoded.loss_mask
        columns[f"{side}_label_decode"] = [
            conversation.encoder.decode(answer) for answer in encoded.answers()
        ]
    longer = max(len(columns["chosen_input_ids"]), len(columns["rejected_input_ids"]))
    columns |= {"margin": row.margin, "seq_length": longer, "seq_category": row.category}
    return [(columns, False)]


def kto_rows(row: SourceRow, conversation: Conversation, max_length: int) -> Made:
    """The conversation parted where its last answer begins, and whether that answer is wanted."""
    answer = {"role": "assistant", "content": row.completion}
    encoded = conversation.encode_answer([*row.messages, answer], max_length)
    start = encoded.spans[0][0]
    prompt, completion = encoded.input_ids[:start], encoded.input_ids[start:]
    columns = {
        "prompt": prompt,
        "completion": completion,
        "label": row.label,
        "input_id_decode": conversation.encoder.decode(encoded.input_ids),
        "completion_decode": conversation.encoder.decode(completion),
        "seq_length": len(encoded.input_ids),
        "seq_category": row.category,
    }
    return [(columns, False)]


def _check_length(needed: int, max_length: int) -> None:
    if needed > max_length:
        raise RowError("too_long", f"{needed} tokens are needed, max_length is {max_length}")


TOKENIZERS: dict[str, Callable[[SourceRow, Conversation, int], Made]] = {
    "sft": sft_rows,
    "prompt": prompt_rows,
    "preference": preference_rows,
    "kto": kto_rows,
}


def tokenize_sft(
    data_point: dict[str, Any],
    tokenizer,
    conversation_template: Conversation,
    max_length: int = 4096,
) -> Columns:
    """One conversation as ``input_ids`` and ``labels`` (-100: no loss), never longer than
    ``max_length`` tokens.

    Keeps the first complete rounds that fit. All columns are None when the row cannot be used
    (``sft_rows`` says why). With a template that rewrites earlier turns: the row of the last
    answer. ``tokenizer`` must be the template's.
    """
    return _tokenize("sft", data_point, tokenizer, conversation_template, max_length)


def tokenize_prompt(
    data_point: dict[str, Any],
    tokenizer,
    conversation_template: Conversation,
    max_length: int = 4096,
) -> Columns:
    """One prompt as ``input_ids``, generation prompt included; a last answer is left out. None as
    in tokenize_sft."""
    return _tokenize("prompt", data_point, tokenizer, conversation_template, max_length)


def tokenize_rlhf(
    data_point: dict[str, Any],
    tokenizer,
    conversation_template: Conversation,
    max_length: int = 4096,
) -> Columns:
    """One preference row as ``chosen_`` and ``rejected_`` ``input_ids`` and ``loss_mask`` (the last
    answer of each).

    None as in tokenize_sft.
    """
    return _tokenize("preference", data_point, tokenizer, conversation_template, max_length)


def tokenize_kto(
    data_point: dict[str, Any],
    tokenizer,
    conversation_template: Conversation,
    max_length: int = 4096,
) -> Columns:
    """One judged answer as the ids of ``prompt`` and ``completion`` and its ``label``. None as in
    tokenize_sft."""
    return _tokenize("kto", data_point, tokenizer, conversation_template, max_length)


def _tokenize(
    type: str, data_point: Any, tokenizer, conversation: Conversation, max_length: int
) -> Columns:
    if tokenizer is not conversation.tokenizer:
        raise ValueError(
            "tokenizer: conversation_template was made for another tokenizer; make it with this "
            "one "
            "(setup_conversation_template)"
        )
    try:
        return TOKENIZERS[type](READERS[type](data_point), conversation, max_length)[-1][0]
    except RowError:
        return dict.fromkeys(COLUMNS[type])
