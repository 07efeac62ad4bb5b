"""Documents as token ids: plain texts, around which no chat template writes anything."""

import os
from typing import Any

from coati.dataset.chat.chat_encoder import ChatEncoder
from coati.dataset.chat.document_ends import end_of_document
from coati.dataset.chat.row_options import RowOptions
from coati.dataset.rows.text_files import pieces_of
from coati.utils.json_io import save_json


class PlainText:
    """Stands where a :class:`~coati.dataset.chat.conversation.Conversation` does when rows need no
    chat template: the tokenizer alone says how a document begins and ends.

    Raises ValueError for a tokenizer without eos token.
    """

    template_mode = "per_turn"
    options = RowOptions()

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.encoder = ChatEncoder(tokenizer)
        self.stop_ids = [[end_of_document(tokenizer)]]

    def to_config(self) -> dict[str, Any]:
        """No field of a template file: whoever trains on the rows keeps the tokenizer's own."""
        return {}

    def save(self, path: str | os.PathLike) -> None:
        """Write the empty template file."""
        save_json(self.to_config(), path)


def encode_document(
    tokenizer: Any, encoder: ChatEncoder, text: str, begins: bool = True, ends: bool = True
) -> list[int]:
    """The ids of ``text`` as (a piece of) a document: its start if it ``begins`` with this piece,
    the text, eos if it ``ends`` with it. A long text is encoded in pieces, since a tokenizer takes
    some hundred bytes of memory for each of its characters.

    Control markers in the text are encoded as text. Raises RowError where the tokenizer cannot do
    that, ValueError without eos token.
    """
    eos = end_of_document(tokenizer)
    ids = list(encoder.document_start) if begins else []
    for number, piece in enumerate(pieces_of(text)):
        ids += encoder.encode_text(piece, inside=number > 0 or not begins)
    return [*ids, eos] if ends else ids
