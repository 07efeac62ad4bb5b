"""Token ids to text: exactly what was written, at once or token by token at linear cost."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]  # sentencepiece's byte fallback
REPLACEMENT = "\ufffd"
# A character has at most 4 bytes, so what 8 tokens do not finish is no character that is still to
# come.
LONGEST_UNFINISHED = 8


def decode(tokenizer: Any, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
    """The text of ``ids`` as the model wrote it. Tokenizers may be told to remove spaces before
    punctuation when they decode (``clean_up_tokenization_spaces``): code and quotations lose
    characters by it, so it is never done."""
    return tokenizer.decode(
        list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )


class Detokenizer:
    """Takes token ids one by one; the pieces that it returns are, joined, :func:`decode` of all,
    special tokens skipped.

    Only a window of the last tokens is decoded for each new one: those since the last point where
    the text was certain, and as context those of the step before, because a token's text may depend
    on the one before it (prefix spaces, word pieces). Text that a later token can change is held
    back: the bytes of an unfinished character, and with byte fallback all bytes of a run, which
    tokenizers turn into replacement characters as a whole when the run is no valid UTF-8.

    Args:
        tokenizer: any of transformers', fast or slow.
        before: ids that stand before the first one and whose text is not returned, as of a prompt
            that is continued.
        shown: special tokens that are not skipped.
    """

    def __init__(
        self,
        tokenizer: Any,
        before: Sequence[int] = (),
        shown: frozenset[int] = frozenset(),
    ) -> None:
        self.tokenizer = tokenizer
        self.shown = shown
        self.before = list(before)
        self.text = ""  # what was returned
        self._ids: list[int] = []
        self._bytes = _byte_ids(tokenizer)
        self._in_bytes = False
        self._window = list(before)
        self._context = len(before)  # tokens of the window whose text is settled
        self._seen = len(self._decode(before))  # characters of the window's text, returned before

    def push(self, token: int) -> str:
        """The text that is certain with ``token``, often empty."""
        self._ids.append(token)
        self._window.append(token)
        if token in self._bytes:
            self._in_bytes = True
            return ""
        if self._in_bytes and not self._decode([token]):
            return ""  # a token that is skipped does not end a run of bytes
        self._in_bytes = False
        whole = self._decode(self._window)
        certain = whole.removesuffix(REPLACEMENT)
        piece = certain[self._seen :]
        self._seen = max(self._seen, len(certain))
        if piece and certain == whole:
            self._settle()
        elif not piece and self._is_skipped(token):
            self._window.pop()
        elif len(self._window) > self._context + 2 * LONGEST_UNFINISHED:
            self._shorten()
        self.text += piece
        return piece

    def finish(self) -> str:
        """The rest, once all ids have come."""
        start = len(self._decode(self.before)) if self.before else 0
        whole = self._decode([*self.before, *self._ids])[start:]
        piece = whole[len(self.text) :]
        self.text += piece
        return piece

    def _decode(self, ids: Sequence[int]) -> str:
        if self.shown.isdisjoint(ids):
            return decode(self.tokenizer, ids) if ids else ""
        kept = [token for token in ids if token in self.shown or token not in self._special]
        return decode(self.tokenizer, kept, skip_special_tokens=False)

    def _settle(self) -> None:
        """Make the new tokens the context of the next ones, if they are something to lean on: after
        nothing but skipped tokens the next would be decoded as the first of a text."""
        context = self._window[self._context :]
        if text := self._decode(context):
            self._window = context
            self._context = len(context)
            self._seen = len(text)

    def _is_skipped(self, token: int) -> bool:
        return token in self._special and not self._decode([token])

    @cached_property
    def _special(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset(id for id, token in added if token.special)

    def _shorten(self) -> None:
        """Forget the beginning of a long window of bytes that make no text. UTF-8 finds its way
        again within a character, so the end is decoded alike from any token a little before it."""
        window = self._window[-LONGEST_UNFINISHED:]
        text = self._decode(window)
        if text.endswith(REPLACEMENT) and len(text) > 1:
            self._window = window
            self._context = 0
            self._seen = len(text) - 1


def _byte_ids(tokenizer: Any) -> frozenset[int]:
    """The ids of the tokens that stand for one byte each; empty without byte fallback."""
    ids = tokenizer.convert_tokens_to_ids(BYTE_TOKENS)
    unknown = tokenizer.unk_token_id
    return frozenset(id for id in ids if id is not None and id != unknown)
