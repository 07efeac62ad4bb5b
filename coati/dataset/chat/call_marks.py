"""The texts that a template writes around calls of tools, found again in what a model writes:
white space between their parts may differ, numbers and ids are other ones."""

import re
from collections.abc import Sequence
from typing import NamedTuple

# A tag, a bracketed control word, a word, white space, or one character.
_ATOMS = re.compile(r"<[^<>\n]{1,60}>|\[[A-Z_/]+\]|\w+|\s+|.", re.DOTALL)
_ID = re.compile(r"[\w.:-]+")
_DIGITS = re.compile(r"\d+")
_SPACE = re.compile(r"\s*")


class Found(NamedTuple):
    """A mark ends at ``end``; ``partial``: the text ends within it, after ``parts`` whole parts.
    ``id``: that of a call."""

    end: int
    parts: int
    partial: bool = False
    id: str | None = None


def atoms(text: str) -> list[str]:
    """The parts of which ``text`` can be cut only between."""
    return _ATOMS.findall(text)


def common_beginning(first: str, second: str) -> str:
    """The longest common beginning that cuts no part."""
    same = []
    for one, other in zip(atoms(first), atoms(second), strict=False):
        if one != other:
            break
        same.append(one)
    return "".join(same)


class Mark:
    """A text to look for. ``ids``: texts in it that stand for any id of a call."""

    def __init__(self, text: str, ids: Sequence[str] = ()) -> None:
        self.text = text
        self._atoms: list[str | re.Pattern] = []
        for atom in atoms(text):
            if atom in ids:
                self._atoms.append(_ID)
            elif atom.isdecimal():
                self._atoms.append(_DIGITS)
            elif not atom.isspace():
                self._atoms.append(atom)

    def __len__(self) -> int:
        """Of how many parts it is."""
        return len(self._atoms)

    @property
    def first(self) -> str:
        """The part that it begins with, "" where that is none of its own."""
        first = self._atoms[0] if self._atoms else ""
        return first if isinstance(first, str) else ""

    @property
    def distinct(self) -> bool:
        """Whether an ordinary text hardly holds it."""
        return any(
            isinstance(atom, str) and len(atom) > 2 and not atom.isalnum() for atom in self._atoms
        ) or (self.first == "<" and len(self._atoms) > 1)

    def match(self, text: str, start: int) -> Found | None:
        """Where it ends that begins at ``start``, white space before it passed over; None where it
        does not stand there."""
        end = start
        found = None
        for number, atom in enumerate(self._atoms):
            begin = skip_space(text, end)
            if begin == len(text):
                return Found(begin, number, partial=True)
            if isinstance(atom, re.Pattern):
                matched = atom.match(text, begin)
                if matched is None:
                    return None
                end = matched.end()
                if atom is _ID:
                    found = matched.group()
                if end == len(text):
                    return Found(end, number, partial=True)
                continue
            if text.startswith(atom, begin):
                end = begin + len(atom)
            elif atom.startswith(text[begin:]):
                return Found(len(text), number, partial=True)
            else:
                return None
        return Found(end, len(self._atoms), id=found)


def skip_space(text: str, start: int) -> int:
    """The place of the first character from ``start`` on that is no white space."""
    return _SPACE.match(text, start).end()  # type: ignore[union-attr]


def held_back(text: str, start: int, beginnings: Sequence[str]) -> int:
    """From where on ``text`` may go on to be one of ``beginnings``; white space before it too."""
    hold = len(text)
    for beginning in beginnings:
        for size in range(min(len(beginning) - 1, len(text) - start), 0, -1):
            if text.endswith(beginning[:size]):
                hold = min(hold, len(text) - size)
                break
    return max(start, len(text[:hold].rstrip()))
