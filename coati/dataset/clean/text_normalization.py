"""Texts in a form in which those that differ in letters' case, width or white space alone are
equal."""

import re
import unicodedata
import zlib

import numpy as np

from coati.dataset.rows.source_row import SourceRow

# Scripts written without blanks count one character as one word.
_ONE_EACH = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
)
_ONE_EACH += "\U00020000-\U0003ffff"
_WORD = re.compile(f"[{_ONE_EACH}]|[^\\W{_ONE_EACH}]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def normalize(text: str) -> str:
    """NFKC, case folded, every run of white space one blank."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def words(text: str) -> list[str]:
    """The words of ``text`` in normal form, without punctuation; of Chinese and its like, the
    characters."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def word_hashes(found: list[str]) -> np.ndarray:
    """(words,) uint64."""
    return np.fromiter(
        (zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in found), np.uint64, len(found)
    )


def grams(hashes: np.ndarray, size: int) -> np.ndarray:
    """(words - size + 1,) uint64: one number for each run of ``size`` words; none for fewer
    words."""
    count = max(0, len(hashes) - size + 1)
    mixed = np.full(count, size, dtype=np.uint64)
    for offset in range(size if count else 0):
        mixed = mixed * _FACTOR + hashes[offset : offset + count]
        mixed ^= mixed >> np.uint64(32)
    return mixed * _FACTOR


def said(row: SourceRow) -> list[str]:
    """All texts of a row but the system message, which many rows share."""
    turns = (*row.messages, *row.chosen, *row.rejected)
    texts = [turn["content"] for turn in turns if turn["role"] != "system"]
    return texts + [text for text in (row.completion, row.text) if text is not None]


def asked(row: SourceRow) -> str:
    """The whole question of a row: what stands before its last answer, the system message left
    out."""
    turns = row.messages
    if turns and turns[-1]["role"] == "assistant" and not row.chosen and row.completion is None:
        turns = turns[:-1]
    return "\n".join(turn["content"] for turn in turns if turn["role"] != "system")


def whole(row: SourceRow) -> str:
    """Everything that makes a row the row it is, in normal form."""
    turns = [f"{turn['role']}\x1f{normalize(turn['content'])}" for turn in row.messages]
    for name in ("chosen", "rejected"):
        turns += [
            f"{name} {turn['role']}\x1f{normalize(turn['content'])}" for turn in getattr(row, name)
        ]
    if row.completion is not None:
        turns.append(f"completion {row.label}\x1f{normalize(row.completion)}")
    if row.text is not None:
        turns.append(f"text\x1f{normalize(row.text)}")
    return "\x1e".join(turns)
