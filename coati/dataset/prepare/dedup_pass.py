"""The first pass, for cleaning that compares rows: hash every row, then decide which ones to drop.

A row is kept as a few numbers on disk, by shard: a hash of its text, a MinHash signature, the
n-gram hashes of evaluation rows. An interrupted preparation does not hash a finished shard again.
"""

import hashlib
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from coati.dataset.clean.cleaning import Cleaning
from coati.dataset.clean.minhash import PERMUTATIONS, LshIndex, signature
from coati.dataset.clean.overlap import Overlap, benchmark_grams, row_grams
from coati.dataset.clean.text_normalization import canonical_text
from coati.dataset.prepare.shard_plan import Chunk, ShardPlan, is_evaluation
from coati.dataset.prepare.staging import StagingDir
from coati.dataset.prepare.workers import run_by_bin
from coati.dataset.rows.column_names import Layout
from coati.dataset.rows.formats import read_row
from coati.dataset.rows.input_files import decode
from coati.dataset.rows.row_errors import RowError
from coati.dataset.rows.source_row import SourceRow

# file, line and hash of each row; signature if near duplicates are wanted; grams of all rows, with
# the number of each one's row in owners.
RowHashes = dict[str, np.ndarray]
DTYPES = {
    "file": np.uint32,
    "line": np.int64,
    "hash": np.uint64,
    "signature": np.uint32,
    "grams": np.uint64,
    "owners": np.int64,
}
UNREADABLE = 0  # the hash of a row that cannot be read; the second pass reports it
KEPT, DUPLICATE, NEAR_DUPLICATE = range(3)
REASONS = {
    DUPLICATE: ("duplicate", "the text is that of"),
    NEAR_DUPLICATE: ("near_duplicate", "the text is close to that of"),
}


@dataclass
class HashWorker:
    """Hashes what ``cleaning`` compares."""

    type: str
    format: str | None
    cleaning: Cleaning
    layouts: list[Layout] = field(default_factory=list)  # of each file

    def run(self, chunk: Chunk, evaluation: bool) -> RowHashes:
        """The hashes of one chunk's rows."""
        cleaning = self.cleaning
        found: dict[str, list] = {name: [] for name in DTYPES}
        for index, (file, line, raw) in enumerate(chunk):
            found["file"].append(file)
            found["line"].append(line)
            row = self._read(file, raw) if evaluation or cleaning.compares_all else None
            found["hash"].append(UNREADABLE if row is None else _hash(canonical_text(row)))
            if cleaning.near_duplicates is not None:
                found["signature"].append(signature(row))
            if evaluation and cleaning.drop_eval_overlap and row is not None:
                grams = np.unique(row_grams(row, cleaning.overlap_words))
                found["grams"] += grams.tolist()
                found["owners"] += [index] * len(grams)
        return _arrays(found)

    def _read(self, file: int, raw: Any) -> SourceRow | None:
        layout = self.layouts[file] if self.layouts else None
        try:
            return read_row(self.type, decode(raw), self.format, layout)
        except RowError:
            return None


def _hash(text: str) -> int:
    # 64 bits: among ten million rows the odds of a collision are one to 370,000.
    found = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(found, "little") or 1


def _arrays(found: dict[str, list]) -> RowHashes:
    arrays = {name: np.array(found[name], dtype=dtype) for name, dtype in DTYPES.items()}
    return arrays | {"signature": arrays["signature"].reshape(-1, PERMUTATIONS)}


class HashStore:
    """The hashes of all shards, in ``folder``; those of a shard are there whole or not at all."""

    def __init__(self, folder: Path):
        self.folder = folder

    def has(self, shard: str) -> bool:
        return self._path(shard).exists()

    def save(self, shard: str, chunks: list[RowHashes]) -> None:
        """Store the hashes of ``shard``, chunk by chunk."""
        path = self._path(shard)
        if path.exists():  # of a bin that was interrupted between its two shards
            return
        unfinished = path.with_name(f"{path.name}.part")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        rows = 0
        for chunk in chunks:
            chunk["owners"] += rows
            rows += len(chunk["hash"])
        chunks = chunks or [_arrays({name: [] for name in DTYPES})]
        for name in DTYPES:
            np.save(unfinished / f"{name}.npy", np.concatenate([chunk[name] for chunk in chunks]))
        os.rename(unfinished, path)

    def read(self, shard: str, name: str, on_disk: bool = False) -> np.ndarray:
        """The array ``name`` of ``shard``; ``on_disk``: memory-mapped."""
        return np.load(self._path(shard) / f"{name}.npy", mmap_mode="r" if on_disk else None)

    def _path(self, shard: str) -> Path:
        return self.folder / shard.replace("/", "-")


class Duplicates:
    """Which rows of which shard are dropped because of an earlier row, and of which one.

    Takes 30 bytes a row, and as much again while exact duplicates are looked for.
    """

    def __init__(self, store: HashStore, shards: list[str], files: list[str]):
        # Evaluation rows count as the earlier ones: what both splits hold stays in the evaluation
        # split.
        self.shards = sorted(shards, key=lambda shard: (not is_evaluation(shard), shard))
        self.store = store
        self.files = files
        self.file = self._joined("file")
        self.line = self._joined("line")
        self.hash = self._joined("hash")
        sizes = [len(store.read(shard, "hash", on_disk=True)) for shard in self.shards]
        self.starts = dict(zip(self.shards, np.cumsum([0, *sizes]).tolist(), strict=False))
        self.code = np.zeros(len(self.hash), dtype=np.uint8)
        self.other = np.zeros(len(self.hash), dtype=np.int64)

    def _joined(self, name: str) -> np.ndarray:
        return np.concatenate([self.store.read(shard, name) for shard in self.shards])

    def __call__(self, shard: str, number: int) -> RowError | None:
        if shard not in self.starts:  # only evaluation rows were hashed
            return None
        row = self.starts[shard] + number
        code = int(self.code[row])
        if code == KEPT:
            return None
        reason, how = REASONS[code]
        return RowError(reason, f"{how} {self.place(self.other[row])}")

    def place(self, row: int) -> str:
        return f"{self.files[self.file[row]]}:{self.line[row]}"

    def mark_exact(self) -> None:
        """Drop every row with the text of an earlier row."""
        _, first, same = np.unique(self.hash, return_index=True, return_inverse=True)
        earlier = first[same]
        again = (earlier < np.arange(len(earlier))) & (self.hash != UNREADABLE)
        self.code[again] = DUPLICATE
        self.other[again] = earlier[again]

    def mark_near(self, threshold: float) -> None:
        """Drop every row that is close to an earlier row that stays."""
        index = LshIndex(threshold)
        for shard in self.shards:
            signatures = self.store.read(shard, "signature", on_disk=True)
            for row, found in enumerate(signatures, self.starts[shard]):
                if self.code[row] != KEPT or self.hash[row] == UNREADABLE:
                    continue
                earlier = index.find(found)
                if earlier is None:
                    index.add(row, found)
                else:
                    self.code[row] = NEAR_DUPLICATE
                    self.other[row] = earlier

    def evaluation_grams(self) -> list[tuple[str, str, np.ndarray]]:
        """``(reason, place, n-gram hashes)`` of each evaluation row."""
        found = []
        for shard in filter(is_evaluation, self.shards):
            grams = self.store.read(shard, "grams")
            rows, starts = np.unique(self.store.read(shard, "owners"), return_index=True)
            for row, of_row in zip(rows, np.split(grams, starts)[1:], strict=True):
                found.append(("eval_overlap", self.place(self.starts[shard] + row), of_row))
        return found


def compare_rows(
    plan: ShardPlan, worker: HashWorker, staging: StagingDir, files: list[str], num_proc: int
) -> tuple[Duplicates | None, Overlap | None]:
    """Which rows duplicate others, and the n-grams that training rows must not contain."""
    cleaning = worker.cleaning
    grams = benchmark_grams(cleaning.benchmark_files, cleaning.overlap_words)
    duplicates = None
    if cleaning.compares_all or cleaning.drop_eval_overlap:
        duplicates = _hash_rows(plan, worker, staging, files, num_proc)
        if cleaning.deduplicate:
            duplicates.mark_exact()
        if cleaning.near_duplicates is not None:
            duplicates.mark_near(cleaning.near_duplicates)
        if cleaning.drop_eval_overlap:
            grams += duplicates.evaluation_grams()
    return duplicates, Overlap.of(cleaning.overlap_words, grams) if grams else None


def _hash_rows(
    plan: ShardPlan, worker: HashWorker, staging: StagingDir, files: list[str], num_proc: int
) -> Duplicates:
    store = HashStore(staging.scratch)
    everything = worker.cleaning.compares_all
    wanted = [bin for bin in plan.bins if everything or bin.evaluation or bin.split]
    todo = [bin for bin in wanted if not all(map(store.has, bin.shards))]
    tasks = plan.tasks(todo, plan.selection)
    for bin, chunks in run_by_bin(worker, tasks, num_proc, staging.lock):
        by_shard: dict[str, list[RowHashes]] = {shard: [] for shard in bin.shards}
        for shard, hashes in chunks:
            by_shard[shard].append(hashes)
        for shard, hashes in by_shard.items():
            store.save(shard, hashes)
    return Duplicates(store, [shard for bin in wanted for shard in bin.shards], files)
