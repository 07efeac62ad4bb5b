"""What an input's name says beside where it is: ``PATH:SUBSET@SPLIT#ROWS``."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coati.dataset.rows.column_names import Layout

_ROWS = re.compile(r"(.+)#(\d+)")
_SPLIT = re.compile(r"(.+)@([\w-]+)")
_SUBSET = re.compile(r"(.+?):([\w./-]+)")


@dataclass(frozen=True)
class InputName:
    """``subset``: a configuration of a data set on the hub, or an entry of a dataset_info.json;
    ``rows``: as many of the first rows are read. Raises ValueError for none."""

    base: str
    subset: str | None = None
    split: str | None = None
    rows: int | None = None

    def __post_init__(self):
        if self.rows == 0:
            raise ValueError(f"{self.base}#0 reads no row; name how many, or leave #0 out")


def parse_input(name: str) -> InputName:
    """The parts of ``name``, from its end on, as far as no file or folder of that name is there."""
    parts: list[str | None] = []
    for pattern in (_ROWS, _SPLIT, _SUBSET):
        found = None if Path(name).exists() else pattern.fullmatch(name)
        name, part = (found[1], found[2]) if found else (name, None)
        parts.append(part)
    rows, split, subset = parts
    return InputName(name, subset, split, None if rows is None else int(rows))


@dataclass(frozen=True)
class Source:
    """A file of rows. ``limit``: of the files of input ``number`` together as many of the first
    rows are read, None: all."""

    path: Path
    layout: Layout = field(default_factory=Layout)
    limit: int | None = None
    number: int = 0

    def described(self) -> dict[str, Any]:
        """What beside the file decides its rows; empty for most."""
        found: dict[str, Any] = self.layout.described() if self.layout else {}
        return found if self.limit is None else {**found, "rows": self.limit}
