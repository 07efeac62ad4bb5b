"""Log-probs of tokens, as OpenAI's protocol gives them."""

from typing import Any, NamedTuple

from torch import Tensor

from coati.models.generation.detokenize import BYTE_TOKENS, REPLACEMENT, decode

MOST_ALTERNATIVES = 20
LOWEST = -9999.0  # stands for minus infinity, which JSON has not


class TokenText(NamedTuple):
    """What a token adds to a text. ``bytes`` None: unknown, of a part of a character."""

    text: str
    bytes: list[int] | None


class TokenLogprob(NamedTuple):
    """A token of a response: its log-prob before temperature and filters, the likeliest tokens
    there with theirs, and ``offset``, the characters of the response before it."""

    token: TokenText
    logprob: float
    alternatives: list[tuple[TokenText, float]]
    offset: int


class TokenScorer:
    """Scores tokens by the logits that they were drawn from. Not thread-safe."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._texts: dict[int, TokenText] = {}

    def __call__(self, token: int, logits: Tensor, alternatives: int, offset: int) -> TokenLogprob:
        """``logits`` (V,) fp32."""
        logps = logits.log_softmax(dim=-1)
        values, ids = logps.topk(min(alternatives, len(logps)))
        top = zip(ids.tolist(), values.tolist(), strict=True)
        return TokenLogprob(
            self.text_of(token),
            max(float(logps[token]), LOWEST),
            [(self.text_of(id), max(value, LOWEST)) for id, value in top],
            offset,
        )

    def text_of(self, token: int) -> TokenText:
        """The text of ``token`` in the middle of others, its space included; of a part of a
        character the bytes, written ``\\xe4``."""
        if token not in self._texts:
            self._texts[token] = self._read(token)
        return self._texts[token]

    def _read(self, token: int) -> TokenText:
        once = decode(self.tokenizer, [token], skip_special_tokens=False)
        text = decode(self.tokenizer, [token] * 2, skip_special_tokens=False)[len(once) :]
        if REPLACEMENT not in text:
            return TokenText(text, list(text.encode("utf-8", "replace")))
        found = _bytes_of(self.tokenizer.convert_ids_to_tokens(token))
        if found is None:
            return TokenText(text, None)
        return TokenText("".join(f"\\x{byte:02x}" for byte in found), found)


def _bytes_of(piece: str) -> list[int] | None:
    """The bytes that a vocabulary's ``piece`` stands for, by byte fallback or byte-level BPE."""
    if piece in BYTE_TOKENS:
        return [BYTE_TOKENS.index(piece)]
    # GPT-2's alphabet: printable bytes are themselves, the others follow from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet |= {chr(256 + number): byte for number, byte in enumerate(others)}
    return [alphabet[letter] for letter in piece] if set(piece) <= set(alphabet) else None
