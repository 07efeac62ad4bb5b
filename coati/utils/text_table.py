"""Texts in columns for a terminal: wide letters take two places, control characters none that could
move the cursor."""

import shutil
import unicodedata
from collections.abc import Sequence

NARROWEST, WIDEST = 24, 200


def terminal_width(width: int | None = None) -> int:
    """``width``, or that of the terminal, within what a table can be read in."""
    return max(NARROWEST, min(width or shutil.get_terminal_size((100, 24)).columns, WIDEST))


def places(text: str) -> int:
    """Columns of a terminal that ``text`` takes."""
    return sum(_places(letter) for letter in text)


def _places(letter: str) -> int:
    if unicodedata.combining(letter):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def pad(text: str, width: int, right: bool = False) -> str:
    """``text`` filled up with blanks to ``width`` places, on its left when ``right``."""
    blanks = " " * (width - places(text))
    return blanks + text if right else text + blanks


def wrap(text: str, width: int, most: int = 6) -> list[str]:
    """``text`` in lines of at most ``width`` places, at most ``most`` of them; white space counts
    as one blank.

    Words longer than a line are cut. What a terminal would not print is shown as a dot. A text
    without letters is "(empty)", one that goes on ends in " ...".
    """
    printable = "".join(
        letter if letter.isprintable() else "\N{MIDDLE DOT}" for letter in " ".join(text.split())
    )
    lines, line = [], ""
    for word in printable.split(" "):
        for piece in _pieces(word, width):
            joined = f"{line} {piece}" if line else piece
            if line and places(joined) > width:
                lines.append(line)
                line = piece
            else:
                line = joined
    lines += [line] if line else []
    if len(lines) > most:
        lines = [*lines[: most - 1], _cut(lines[most - 1], width)]
    return lines or _pieces("(empty)", width)


def _pieces(word: str, width: int) -> list[str]:
    pieces, piece = [], ""
    for letter in word:
        if piece and places(piece + letter) > width:
            pieces.append(piece)
            piece = ""
        piece += letter
    return [*pieces, piece]


def _cut(line: str, width: int) -> str:
    while places(line) > width - 4:
        line = line[:-1]
    return f"{line.rstrip()} ..."


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    widths: Sequence[int],
    numbers: Sequence[bool],
) -> str:
    """``rows`` of as many texts as ``widths``, wrapped; a column of ``numbers`` stands on the
    right."""
    lines = [*_row(header, widths, numbers), "-+-".join("-" * width for width in widths)]
    for row in rows:
        lines += _row(row, widths, numbers)
    return "\n".join(lines)


def _row(cells: Sequence[str], widths: Sequence[int], numbers: Sequence[bool]) -> list[str]:
    wrapped = [
        wrap(cell, width) if cell else [""] for cell, width in zip(cells, widths, strict=True)
    ]
    height = max(map(len, wrapped))
    filled = [lines + [""] * (height - len(lines)) for lines in wrapped]
    lines = zip(*filled, strict=True)
    return [" | ".join(map(pad, line, widths, numbers)).rstrip() for line in lines]
