"""The documents of a .txt file: the file, its paragraphs, or its lines."""

import re
from collections.abc import Iterator
from itertools import count
from typing import BinaryIO

from coati.dataset.rows.row_errors import RowError

PIECE = 1 << 17  # bytes of a document that are read and tokenized at a time
# A blank between two words, where all tokenizers part words, and whose first ids are the same
# whether the text before it is there or not; else the end of a line.
_CUTS = (re.compile(rb"[^\s](?= [^\s])"), re.compile(rb"\n(?=[^\s])"), re.compile(rb"[\n ]"))
_LOOKED_AT = 1 << 12  # bytes before the end of a piece in which it is cut
_BOM = b"\xef\xbb\xbf"


class Piece(str):
    """A piece of a document that is read in several."""

    begins: bool
    ends: bool

    @classmethod
    def of(cls, text: str, begins: bool, ends: bool) -> "Piece":
        found = cls(text)
        found.begins = begins
        found.ends = ends
        return found


Found = Iterator[tuple[int, str | RowError]]


def documents_of(stream: BinaryIO, unit: str) -> Found:
    """``(line, text)`` of each document; ``unit``: a name of DOCUMENTS. Line ends become \\n, and
    white space at the end of a document is left out. Of the unit file the document comes in pieces
    of some PIECE bytes."""
    if unit == "file":
        yield from _whole(stream)
    elif unit == "paragraph":
        yield from _paragraphs(stream)
    else:
        for number, line in enumerate(stream, 1):
            if line.removeprefix(_BOM if number == 1 else b"").strip():
                yield number, _decoded(line, number == 1)


def _paragraphs(stream: BinaryIO) -> Found:
    """Runs of lines between blank ones."""
    held: list[bytes] = []
    first = 1
    for number, line in enumerate(stream, 1):
        if line.removeprefix(_BOM if number == 1 else b"").strip():
            first = first if held else number
            held.append(line)
        elif held:
            yield first, _decoded(b"".join(held), first == 1)
            held = []
    if held:
        yield first, _decoded(b"".join(held), first == 1)


def _whole(stream: BinaryIO) -> Found:
    line = 1
    buffer = b""
    for number in count():
        while len(buffer) < PIECE + _LOOKED_AT and (more := stream.read(PIECE)):
            buffer += more
        if len(buffer) < PIECE + _LOOKED_AT:  # the rest of the file
            last = _decoded(buffer, number == 0)
            if isinstance(last, RowError) or (number == 0 and last):
                yield line, last
            elif number:
                yield line, Piece.of(last, False, True)
            return
        end = _cut(buffer)
        found = _decoded(buffer[:end], number == 0, strip=False)
        yield line, found if isinstance(found, RowError) else Piece.of(found, number == 0, False)
        line += buffer.count(b"\n", 0, end)
        buffer = buffer[end:]


def pieces_of(text: str) -> Iterator[str]:
    """``text`` in pieces of some PIECE bytes, cut as documents in files are."""
    start = 0
    while len(text) - start > PIECE + _LOOKED_AT:
        buffer = text[start : start + PIECE + _LOOKED_AT].encode("utf-8")
        piece = buffer[: _cut(buffer)].decode("utf-8")
        yield piece
        start += len(piece)
    yield text[start:]


def _cut(buffer: bytes) -> int:
    """Where a piece of some PIECE bytes ends, with text behind it."""
    for cut in _CUTS:
        places = [found.end() for found in cut.finditer(buffer, PIECE - _LOOKED_AT, PIECE)]
        if places and buffer[places[-1] :].strip():
            return places[-1]
    for end in range(PIECE, PIECE - 4, -1):
        if buffer[end] & 0xC0 != 0x80:  # not inside a character
            return end
    return PIECE  # not UTF-8


def _decoded(line: bytes, first: bool, strip: bool = True) -> str | RowError:
    try:
        text = line.removeprefix(_BOM if first else b"").decode("utf-8")
    except UnicodeDecodeError as error:
        return RowError(
            "bad_text",
            f"not UTF-8 text (byte {error.start}); convert the file with iconv -t UTF-8",
        )
    text = text.replace("\r\n", "\n")
    return text.rstrip() if strip else text
