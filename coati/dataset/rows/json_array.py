"""The elements of a JSON array one after the other, found by their brackets: memory holds one of
them, undecoded."""

import re
from collections.abc import Iterator
from typing import BinaryIO

BLOCK = 1 << 20
BLANK = b" \t\r\n"
# A string (it ends with its line at the latest), a bracket, a comma, or a quote whose string has
# not been read whole.
_MARK = re.compile(rb'"[^"\\\n]*(?:\\.[^"\\\n]*)*["\n]|[\[\]{}",]', re.DOTALL)


def array_elements(stream: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """``(line, text)`` of each element of the array that begins at the first ``[``; blank elements
    are left out.

    The text of an element is not checked, and what follows the array is not read. Of an array
    without end the last text is None.
    """
    buffer, line = _after_bracket(stream)
    scanned, depth, wanted = 0, 0, BLOCK
    while True:
        start = 0
        for mark in _MARK.finditer(buffer, scanned):
            kind = mark.group()
            if kind == b'"':  # no end yet; the next block may bring it
                break
            scanned = mark.end()
            if kind in (b"{", b"["):
                depth += 1
            elif kind in (b"}", b"]"):
                depth -= 1
            if depth < 0 or (depth == 0 and kind == b","):
                yield from _element(buffer[start : mark.start()], line)
                line += buffer.count(b"\n", start, scanned)
                start = scanned
                if depth < 0:
                    return
        more = stream.read(wanted)
        if not more:
            rest = buffer[start:]
            yield line + rest[: len(rest) - len(rest.lstrip(BLANK))].count(b"\n"), None
            return
        # A long element is looked through in growing steps, so that its beginning is not copied
        # again and again.
        wanted = BLOCK if start else 2 * wanted
        buffer, scanned = buffer[start:] + more, scanned - start


def _after_bracket(stream: BinaryIO) -> tuple[bytes, int]:
    """What was read behind the first ``[``, and its line."""
    line = 1
    while block := stream.read(BLOCK):
        before, bracket, rest = block.partition(b"[")
        line += before.count(b"\n")
        if bracket:
            return rest, line
    return b"", line


def _element(text: bytes, line: int) -> Iterator[tuple[int, bytes]]:
    stripped = text.lstrip(BLANK)
    if stripped:
        yield line + text.count(b"\n", 0, len(text) - len(stripped)), stripped.rstrip(BLANK)
