"""Whether a tokenizer fits a chat template: gives back a text, has a token for each marker."""

import re
from typing import Any

# What control tokens of today's families look like.
_MARKER = re.compile(
    r"<\|[^<>|\s]{1,40}\|>|<｜[^<>｜\s]{1,40}｜>|<\|[a-z_]{2,30}>|<[a-z_]{2,30}\|>"
    r"|\[/?[A-Z_]{3,30}\]|\[\|\w{1,20}\|\]|<(?:start|end)_of_\w{1,20}>|</?s>|<(?:bos|eos)>"
)
MOST = 6  # markers that are named


def given_back(tokenizer: Any, text: str) -> str:
    """What becomes of ``text`` in tokens and back, without spaces at its ends."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return _text(tokenizer, ids).strip()


def cut(tokenizer: Any, text: str) -> str:
    """The pieces that ``text`` is cut into."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return " ".join(repr(_text(tokenizer, [each])) for each in ids)


def _text(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def cut_markers(tokenizer: Any, text: str) -> str:
    """The markers in a rendered ``text`` that the tokenizer has no token for, with the pieces that
    they are cut into; "" where there are none."""
    known = tokenizer.get_vocab()
    missing = [each for each in dict.fromkeys(_MARKER.findall(text)) if each not in known]
    named = ", ".join(f"{each!r} ({cut(tokenizer, each)})" for each in missing[:MOST])
    return named + (f" and {len(missing) - MOST} more" if len(missing) > MOST else "")
