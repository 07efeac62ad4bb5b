"""The first of two passes, for cleaning that compares rows: what workers note of each row, and what
follows from it.

A row is noted as a few numbers: a hash of its text, a MinHash signature, the word runs of
evaluation rows. They are kept on disk by shard, so an interrupted preparation need not note them
again.
"""

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coati.dataset.clean.cleaning import Cleaning
from coati.dataset.clean.minhash import PERMUTATIONS, NearIndex, signature
from coati.dataset.clean.overlap import row_grams
from coati.dataset.clean.text_normalization import whole
from coati.dataset.prepare.shard_plan import Chunk, is_evaluation
from coati.dataset.rows.formats import read_row
from coati.dataset.rows.input_files import decode
from coati.dataset.rows.row_errors import RowError
from coati.dataset.rows.source_row import SourceRow

Notes = dict[str, np.ndarray]
UNREAD = 0  # the hash of a row that cannot be read; it is left to the second pass
KEPT, DUPLICATE, NEAR = 0, 1, 2
CODES = {
    DUPLICATE: ("duplicate", "the text is that of"),
    NEAR: ("near_duplicate", "the text is close to that of"),
}


@dataclass
class Survey:
    """The worker of the first pass."""

    type: str
    format: str | None
    cleaning: Cleaning

    def run(self, chunk: Chunk, evaluation: bool) -> Notes:
        """``file``, ``line``, ``hash`` of each row; as asked for ``signature``, and ``grams`` with
        ``owners``."""
        cleaning, compared = self.cleaning, self.cleaning.drop_eval_overlap and evaluation
        notes = {"file": [], "line": [], "hash": [], "signature": [], "grams": [], "owners": []}
        for index, (file, line, raw) in enumerate(chunk):
            notes["file"].append(file)
            notes["line"].append(line)
            row = self._read(raw) if evaluation or cleaning.compares_all else None
            notes["hash"].append(UNREAD if row is None else _hash(whole(row)))
            if cleaning.near_duplicates is not None:
                notes["signature"].append(signature(row))
            if compared and row is not None:
                notes["grams"].append(np.unique(row_grams(row, cleaning.overlap_words)))
                notes["owners"].append(np.full(len(notes["grams"][-1]), index, dtype=np.int64))
        return as_arrays(notes)

    def _read(self, raw: Any) -> SourceRow | None:
        try:
            return read_row(self.type, decode(raw), self.format)
        except RowError:
            return None


def _hash(text: str) -> int:
    # 64 bits: among ten million rows a wrong match has odds of one to 370 000.
    found = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(found, "little") or 1


KINDS = {"file": np.uint32, "line": np.int64, "hash": np.uint64}


def as_arrays(notes: dict[str, list]) -> Notes:
    arrays = {name: np.array(notes.get(name, []), dtype=kind) for name, kind in KINDS.items()}
    arrays["grams"] = np.concatenate([np.empty(0, dtype=np.uint64), *notes.get("grams", [])])
    arrays["owners"] = np.concatenate([np.empty(0, dtype=np.int64), *notes.get("owners", [])])
    arrays["signature"] = np.array(notes.get("signature", []), dtype=np.uint32).reshape(
        -1, PERMUTATIONS
    )
    return arrays


class RowStats:
    """The notes of all shards, in ``folder``: written once a shard is whole, then found there
    again."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._open: dict[str, list[Notes]] = {}
        self._rows: dict[str, int] = {}

    def has(self, shard: str) -> bool:
        return self._path(shard).exists()

    def add(self, shard: str, notes: Notes) -> None:
        """Notes of the next rows of ``shard``."""
        rows = self._rows.get(shard, 0)
        self._rows[shard] = rows + len(notes["hash"])
        self._open.setdefault(shard, []).append(notes | {"owners": notes["owners"] + rows})

    def close(self, shard: str) -> None:
        """Store the notes of ``shard``, which are whole."""
        parts = self._open.pop(shard, None) or [as_arrays({})]
        path = self._path(shard)
        if path.exists():  # of a bin that was interrupted between its two shards
            return
        unfinished = path.with_name(f"{path.name}.part")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for name in parts[0]:
            np.save(unfinished / f"{name}.npy", np.concatenate([part[name] for part in parts]))
        os.rename(unfinished, path)

    def read(self, shard: str, name: str, on_disk: bool = False) -> np.ndarray:
        return np.load(self._path(shard) / f"{name}.npy", mmap_mode="r" if on_disk else None)

    def _path(self, shard: str) -> Path:
        return self.folder / shard.replace("/", "-")


class Refused:
    """Which rows of which shard are left out because of other rows, and whose.

    Takes 30 bytes a row, and as much again while equal rows are looked for.
    """

    def __init__(self, book: RowStats, shards: list[str], files: list[str]):
        # Evaluation rows count as the earlier ones: what both splits hold stays in the evaluation
        # split.
        self.shards = sorted(shards, key=lambda shard: (not is_evaluation(shard), shard))
        self.book, self.files = book, files
        self.file, self.line, self.hash = (self._joined(name) for name in ("file", "line", "hash"))
        sizes = [len(book.read(shard, "hash", on_disk=True)) for shard in self.shards]
        self.starts = dict(zip(self.shards, np.cumsum([0, *sizes]).tolist(), strict=False))
        self.code = np.zeros(len(self.hash), dtype=np.uint8)
        self.other = np.zeros(len(self.hash), dtype=np.int64)

    def _joined(self, name: str) -> np.ndarray:
        return np.concatenate([self.book.read(shard, name) for shard in self.shards])

    def __call__(self, shard: str, number: int) -> RowError | None:
        if shard not in self.starts:  # only evaluation rows were needed
            return None
        row = self.starts[shard] + number
        code = int(self.code[row])
        if code == KEPT:
            return None
        reason, how = CODES[code]
        return RowError(reason, f"{how} {self.place(self.other[row])}")

    def place(self, row: int) -> str:
        return f"{self.files[self.file[row]]}:{self.line[row]}"

    def drop_equal(self) -> None:
        """Refuse every row whose text an earlier row has."""
        _, first, same = np.unique(self.hash, return_index=True, return_inverse=True)
        earlier = first[same]
        again = (earlier < np.arange(len(earlier))) & (self.hash != UNREAD)
        self.code[again], self.other[again] = DUPLICATE, earlier[again]

    def drop_near(self, threshold: float) -> None:
        """Refuse every row that is close to an earlier row that stays."""
        index = NearIndex(threshold)
        for shard in self.shards:
            for row, found in enumerate(
                self.book.read(shard, "signature", on_disk=True), self.starts[shard]
            ):
                if self.code[row] != KEPT or self.hash[row] == UNREAD:
                    continue
                earlier = index.find(found)
                if earlier is None:
                    index.add(row, found)
                else:
                    self.code[row], self.other[row] = NEAR, earlier

    def evaluation_grams(self) -> list[tuple[str, str, np.ndarray]]:
        """``(reason, place, grams)`` of each evaluation row."""
        found = []
        for shard in filter(is_evaluation, self.shards):
            grams, owners = self.book.read(shard, "grams"), self.book.read(shard, "owners")
            ends = np.flatnonzero(np.diff(owners)) + 1
            for mine, row in zip(
                np.split(grams, ends), owners[[0, *ends]] if len(owners) else (), strict=False
            ):
                found.append(("eval_overlap", self.place(self.starts[shard] + row), mine))
        return found
