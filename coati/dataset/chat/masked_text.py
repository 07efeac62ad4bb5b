"""Training rows as text whose supervised parts are marked, for people to look at."""

from collections.abc import Callable, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

GREEN = "\033[32m"
RESET = "\033[0m"
LONGEST = 6000  # characters of one shown text
# (supervised, text); supervised is None for a remark about what was left out.
Segments = list[tuple[bool | None, str]]
# Code point -> sign: of a control character its picture; of others, and of half pairs, one for all.
_SIGNS = {code: 0x2400 + code for code in range(0x20) if code not in (0x9, 0xA)} | dict.fromkeys(
    (*range(0x7F, 0xA0), *range(0xD800, 0xE000)), "\N{REPLACEMENT CHARACTER}"
)


def segments(
    input_ids: Sequence[int], mask: Sequence[bool], decode: Callable[[list[int]], str]
) -> Segments:
    """The row as runs of ``(supervised, text)``; ``mask`` has one entry per id."""
    runs = groupby(zip(map(bool, mask), input_ids, strict=True), key=itemgetter(0))
    return [(supervised, decode([token for _, token in run])) for supervised, run in runs]


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
    return str(text).translate(_SIGNS)
