"""Text normalization for comparing rows: case, width and white space make no difference."""

import json
import re
import unicodedata
import zlib

import numpy as np

from coati.dataset.rows.messages import turn_text
from coati.dataset.rows.source_row import SourceRow, completion_text

# Scripts written without spaces count one character as one word.
_ONE_EACH = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
)
_ONE_EACH += "\U00020000-\U0003ffff"
_WORD = re.compile(f"[{_ONE_EACH}]|[^\\W{_ONE_EACH}]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def normalize(text: str) -> str:
    """NFKC, case-folded, every run of white space one space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def words(text: str) -> list[str]:
    """The normalized words of ``text``, without punctuation; in scripts without spaces (Chinese,
    Thai, ...) the characters."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def word_hashes(found: list[str]) -> np.ndarray:
    """(words,) uint64: the CRC-32 of each word."""
    return np.fromiter(
        (zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in found), np.uint64, len(found)
    )


def ngram_hashes(hashes: np.ndarray, size: int) -> np.ndarray:
    """(words - size + 1,) uint64: a hash of each run of ``size`` words; empty for fewer words."""
    count = max(0, len(hashes) - size + 1)
    mixed = np.full(count, size, dtype=np.uint64)
    for offset in range(size if count else 0):
        mixed = mixed * _FACTOR + hashes[offset : offset + count]
        mixed ^= mixed >> np.uint64(32)
    return mixed * _FACTOR


def spoken_texts(row: SourceRow) -> list[str]:
    """All texts of a row except the system message, which many rows share."""
    turns = (*row.messages, *row.chosen, *row.rejected)
    texts = [turn_text(turn) for turn in turns if turn["role"] != "system"]
    return texts + [text for text in (completion_text(row), row.text) if text is not None]


def prompt_text(row: SourceRow) -> str:
    """The prompt of a row: everything before its last response, without the system message."""
    turns = row.messages
    if turns and turns[-1]["role"] == "assistant" and not row.chosen and row.completion is None:
        turns = turns[:-1]
    return "\n".join(turn_text(turn) for turn in turns if turn["role"] != "system")


def canonical_text(row: SourceRow) -> str:
    """All of a row in normalized form: equal for rows that are duplicates."""
    turns = [f"{turn['role']}\x1f{normalize(turn_text(turn))}" for turn in row.messages]
    for name in ("chosen", "rejected"):
        turns += [
            f"{name} {turn['role']}\x1f{normalize(turn_text(turn))}" for turn in getattr(row, name)
        ]
    if row.completion is not None:
        turns.append(f"completion {row.label}\x1f{normalize(completion_text(row))}")
    if row.text is not None:
        turns.append(f"text\x1f{normalize(row.text)}")
    if row.tools:
        tools = json.dumps(row.tools, sort_keys=True, ensure_ascii=False, default=str)
        turns.append(f"tools\x1f{normalize(tools)}")
    turns += [f"branch\x1f{canonical_text(one)}" for one in row.branches]
    return "\x1e".join(turns)
