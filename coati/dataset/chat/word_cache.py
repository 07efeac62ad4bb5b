"""Token ids by a memory of words, for tokenizers that part a text into words before anything else.

To a byte-level BPE tokenizer a word has the same ids wherever it stands, and most words of a text
have occurred before: parting the text and looking them up takes a fraction of the tokenizer's own
time, and gives its very ids. What it is not sure of is left to the tokenizer: other ways to part a
text, and characters on which two engines for regular expressions, or two versions of Unicode, might
disagree.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain

Span = tuple[int, int]
# How GPT-2, Llama 3 and Qwen 2 part words; many others do it in one of these ways.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
KNOWN = (GPT2, LLAMA3, QWEN2)
# Letters, digits, and all characters that are looked up. No normal form C changes a text of these,
# none is a number but the ten digits, and none but ASCII letters is an ASCII letter in another
# case.
LETTERS = "A-Za-zªµºÀ-ÖØ-öø-žЀ-џ"
DIGITS = "0-9"
SURE = "\t\n\r -~¡-¬®-±´-¸º»¿-žЀ-џ–—‘’“”•…€"
# in memory: some 15 MB
MOST_WORDS = 1 << 16
LONGEST_WORD = 40


def _for_python(pattern: str) -> str:
    """``re`` knows no ``\\p``; among SURE characters the classes are these."""
    inside = pattern.replace(r"\p{L}\p{N}]", f"{LETTERS}{DIGITS}]")
    return inside.replace(r"\p{L}", f"[{LETTERS}]").replace(r"\p{N}", f"[{DIGITS}]")


class Words:
    """The words of a text and their ids, as one tokenizer has them."""

    def __init__(
        self,
        model,
        ways: Iterable[str],
        tokens: dict[str, int],
        spell_bytes: bool = False,
        normalized: bool = False,
    ):
        """``spell_bytes``: see :func:`_spell_bytes`; ``normalized``: texts are, before they are
        parted."""
        self.spell_bytes = spell_bytes
        self._normalized = normalized
        self._memory = _Memory(model, tokens)
        self._ways = [re.compile(way) for way in ways]
        longest_first = sorted(tokens, key=len, reverse=True)
        self._tokens = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self._sure = re.compile(f"[{SURE}]*")

    @classmethod
    def of(cls, backend) -> "Words | None":
        """For ``backend``, a ``tokenizers.Tokenizer``; None when it is of another kind."""
        parts = (backend.normalizer, backend.pre_tokenizer)
        normal, parting = (part and json.loads(part.__getstate__()) for part in parts)
        ways = _ways(parting)
        tokens = list(backend.get_added_tokens_decoder().items())
        odd = any(token.lstrip or token.rstrip or token.single_word for _, token in tokens)
        # The tokenizer matches normalized and other added tokens in separate passes.
        mixed = len({token.normalized for _, token in tokens}) > 1
        if ways is None or odd or mixed or normal not in (None, {"type": "NFC"}):
            return None
        if getattr(backend.model, "dropout", None):
            return None
        by_text = {token.content: i for i, token in tokens}
        return cls(backend.model, ways, by_text, _spell_bytes(backend), normal is not None)

    def encode(
        self, text: str, spans: Sequence[Span] = (), borders: Iterable[int] = ()
    ) -> tuple[list[int], list[Span]] | None:
        """``(ids, token range of each span)``; added tokens are recognized. ``spans`` count
        characters of ``text``.

        None when the tokenizer itself must be asked, which is so where one of ``borders``, the ends
        of ``spans`` among them, lies inside a word: a token may reach over it.
        """
        if not self._sure.fullmatch(text):
            return None
        words = self._part(text)
        ids = [self._memory[word] for word in words]
        ranges = []
        if borders:
            ends = list(accumulate(map(len, words), initial=0))
            if not set(ends).issuperset(borders):
                return None
            before = list(accumulate(map(len, ids), initial=0)) if spans else []
            ranges = [
                (before[bisect_left(ends, start)], before[bisect_left(ends, end)])
                for start, end in spans
            ]
        return list(chain.from_iterable(ids)), ranges

    def spell(self, text: str) -> bool:
        """Whether the ids of ``text`` decode to it, and those between two borders to what stands
        there, so that nobody needs to decode them."""
        return self.spell_bytes and (not self._normalized or bool(self._sure.fullmatch(text)))

    def _part(self, text: str) -> list[str]:
        first, *others = self._ways
        words = []
        for number, part in enumerate(self._tokens.split(text)):
            if number % 2:  # one of the tokens
                words.append(part)
                continue
            pieces = first.findall(part)
            for way in others:
                pieces = [one for piece in pieces for one in way.findall(piece)]
            words += pieces
        return words


class _Memory(dict):
    """Word -> its ids."""

    def __init__(self, model, tokens: dict[str, int]):
        from tokenizers.pre_tokenizers import ByteLevel

        self._always = {text: [i] for text, i in tokens.items()}
        super().__init__(self._always)
        self._model = model
        self._as_bytes = ByteLevel(add_prefix_space=False, use_regex=False)

    def __missing__(self, word: str) -> list[int]:
        spelled = "".join(part for part, _ in self._as_bytes.pre_tokenize_str(word))
        ids = [token.id for token in self._model.tokenize(spelled)]
        if len(self) >= MOST_WORDS:
            self.clear()
            self.update(self._always)
        if len(word) <= LONGEST_WORD:
            self[word] = ids
        return ids


def _spell_bytes(backend) -> bool:
    """Whether the tokens of any text, as they are written, are its bytes: each byte is a token, and
    added tokens are decoded to themselves."""
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    model = backend.model
    decoder = backend.decoder and json.loads(backend.decoder.__getstate__())["type"]
    if decoder != "ByteLevel" or not isinstance(model, BPE):
        return False
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    return all(model.token_to_id(letter) is not None for letter in ByteLevel.alphabet()) and all(
        backend.decode([i], skip_special_tokens=False) == token.content
        for i, token in backend.get_added_tokens_decoder().items()
    )


def _ways(parting: dict | None) -> list[str] | None:
    """The regular expressions by which a text is parted, one after the other; None when they are
    not known."""
    steps = parting.get("pretokenizers", [parting]) if parting else []
    if not steps or steps[-1]["type"] != "ByteLevel":
        return None
    found = [_way(step) for step in steps]
    words = {_for_python(known) for known in KNOWN}
    return [way for way in found if way] if None not in found and words & set(found) else None


def _way(step: dict) -> str | None:
    """Of one step; empty when it parts nothing."""
    kind = step["type"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return _for_python(GPT2) if step["use_regex"] else ""
    if kind == "Digits" and step["individual_digits"]:
        return "[0-9]|[^0-9]+"
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        pattern = step["pattern"].get("Regex")
        return _for_python(pattern) if pattern in KNOWN else None
    return None
