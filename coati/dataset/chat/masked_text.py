"""Training rows as text whose supervised parts are marked, for people to look at."""

from collections.abc import Callable, Sequence
from typing import Any

GREEN = "\033[32m"
RESET = "\033[0m"
LONGEST = 6000  # characters of one shown text
# (supervised, text); supervised is None for a remark about what was left out.
Segments = list[tuple[bool | None, str]]


def segments(
    input_ids: Sequence[int], mask: Sequence[bool], decode: Callable[[list[int]], str]
) -> Segments:
    """The row as runs of ``(supervised, text)``; ``mask`` has one entry per id."""
    runs: list[tuple[bool, list[int]]] = []
    for token, supervised in zip(input_ids, mask, strict=True):
        if not runs or runs[-1][0] != bool(supervised):
            runs.append((bool(supervised), []))
        runs[-1][1].append(token)
    return [(supervised, decode(ids)) for supervised, ids in runs]


def shorten(parts: Segments, longest: int = LONGEST) -> Segments:
    """``parts`` with at most ``longest`` characters: of a longer text the middle is left out, which
    a remark says."""
    left_out = sum(len(text) for _, text in parts) - longest
    if left_out <= 0:
        return parts
    head = _first(parts, longest * 2 // 3)
    tail = _first(
        [(mark, text[::-1]) for mark, text in reversed(parts)], longest - longest * 2 // 3
    )
    remark = f" … {left_out:,} characters left out … "
    return [*head, (None, remark), *((mark, text[::-1]) for mark, text in reversed(tail))]


def _first(parts: Segments, characters: int) -> Segments:
    taken = []
    for mark, text in parts:
        if characters <= 0:
            break
        taken.append((mark, text[:characters]))
        characters -= len(text)
    return taken


def show_mask(parts: Segments, color: bool) -> str:
    """Supervised text in green, or in [[double brackets]]."""
    before, after = (GREEN, RESET) if color else ("[[", "]]")
    return "".join(before + text + after if supervised else text for supervised, text in parts)


def visible(text: Any) -> str:
    """``text`` with its control characters, line breaks and tabs aside, as the signs that stand for
    them, so that they can neither command a terminal nor break a page."""
    return "".join(
        _sign(c) if c < " " or "\x7f" <= c <= "\x9f" or "\ud800" <= c <= "\udfff" else c
        for c in str(text)
    )


def _sign(character: str) -> str:
    if character in "\n\t":
        return character
    return chr(0x2400 + ord(character)) if character < " " else "\N{REPLACEMENT CHARACTER}"
