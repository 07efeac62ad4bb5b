"""Text and tables for a terminal, by rich: wide letters take two places, control characters none
that could move the cursor."""

import io
import shutil
from collections.abc import Sequence

from rich import box
from rich.cells import cell_len as places  # columns of a terminal that a text takes
from rich.cells import set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["NARROWEST", "WIDEST", "places", "table", "terminal_width", "wrap"]

NARROWEST = 24
WIDEST = 200


def terminal_width(width: int | None = None) -> int:
    """``width``, or that of the terminal, within what a table can be read in."""
    return max(NARROWEST, min(width or shutil.get_terminal_size((100, 24)).columns, WIDEST))


def wrap(text: str, width: int, most: int = 6) -> list[str]:
    """``text`` in lines of at most ``width`` places, at most ``most`` of them; white space counts
    as one blank.

    Words longer than a line are cut. What a terminal would not print is shown as a dot. A text
    without letters is "(empty)", one that is truncated ends in " ...".
    """
    words = " ".join(text.split()) or "(empty)"
    printable = "".join(each if each.isprintable() else "\N{MIDDLE DOT}" for each in words)
    wrapped = Text(printable).wrap(_console(width), width, overflow="fold")
    lines = [line.plain.rstrip(" ") for line in wrapped]
    if len(lines) > most:
        lines = [*lines[: most - 1], set_cell_size(lines[most - 1], width - 4).rstrip() + " ..."]
    return lines


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    widths: Sequence[int],
    numbers: Sequence[bool],
) -> str:
    """``rows`` of as many texts as ``widths``, wrapped; a column of ``numbers`` stands on the
    right."""
    grid = Table(box=box.ASCII, show_edge=False, pad_edge=False, show_header=False)
    for width, number in zip(widths, numbers, strict=True):
        grid.add_column(width=width, justify="right" if number else "left")
    for index, row in enumerate([header, *rows]):
        cells = zip(row, widths, strict=True)
        texts = ["\n".join(wrap(cell, width)) if cell else "" for cell, width in cells]
        grid.add_row(*map(Text, texts), end_section=index == 0)
    console = _console(sum(widths) + 3 * len(widths))
    console.print(grid)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _console(width: int) -> Console:
    return Console(file=io.StringIO(), width=width, color_system=None)
