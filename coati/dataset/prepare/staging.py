"""The output folders of a preparation: built beside their final names, kept when interrupted,
renamed when complete."""

import fcntl
import os
import pickle
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from coati.dataset.fingerprint import differences, digest
from coati.dataset.prepare.shard_plan import Bin
from coati.dataset.report.row_stats import RowStats, SampledRow
from coati.utils.json_io import load_json, save_json
from coati.utils.logging import get_logger

logger = get_logger(__name__)

Counts = dict[str, tuple[RowStats, int]]  # shard -> what became of its rows, rows written
MADE_FROM = "made_from.json"
PREPARATION = "preparation.json"


def check_outputs(*outputs: str | os.PathLike) -> None:
    """Raise ValueError for an output that is named twice, or that exists and was not made by a
    preparation."""
    if len({Path(path).resolve() for path in outputs}) < len(outputs):
        raise ValueError(
            f"{outputs[0]} is named for both the jsonl and the arrow output; name two folders"
        )
    for path in outputs:
        if os.path.exists(path) and _made_from(Path(path)) is None:
            raise ValueError(
                f"the output {path} exists already; name another folder, or remove it if it is not "
                "needed"
            )


def _made_from(path: Path) -> dict[str, Any] | None:
    """What the finished output ``path`` says it was made from."""
    return load_json(path / MADE_FROM) if (path / MADE_FROM).is_file() else None


class StagingDir:
    """Where one preparation does its work: hidden folders beside the outputs, named by the
    fingerprint.

    ``arrow`` and ``jsonl`` become the outputs. Beside ``arrow`` stand the counts of the bins that
    are finished: what is counted there is whole and need not be done again.
    """

    def __init__(
        self, arrow: Path, jsonl: Path | None, cache: Path | None, made_from: dict[str, Any]
    ):
        self.arrow_output = arrow
        self.jsonl_output = jsonl
        self.made_from = made_from
        fingerprint = digest(made_from)
        self.root = arrow.with_name(f".{arrow.name}.{fingerprint}.tmp")
        self.arrow = self.root / "arrow"
        self._counts = self.root / "counts"
        self.jsonl = jsonl and jsonl.with_name(f".{jsonl.name}.{fingerprint}.tmp")
        self.scratch = (cache or self.root) / f".notes.{fingerprint}.tmp"
        self.lock: int | None = None
        self._cache = cache
        # Ours to remove, but not an empty folder that was there before.
        there = list(cache.iterdir()) if cache is not None and cache.is_dir() else None
        self._made_cache = there is None or there == [self.scratch]

    def finished(self) -> dict[str, Any] | None:
        """The stored report when the outputs are there and made from the same; ValueError when from
        something else."""
        wanted = [path for path in (self.jsonl_output, self.arrow_output) if path is not None]
        there = [path for path in wanted if path.exists()]
        for path in there:
            before = _made_from(path)
            if before is None:
                check_outputs(path)
            elif before != self.made_from:
                raise ValueError(
                    f"the output {path} exists already, made from something else: "
                    f"{differences(before, self.made_from)}; name another folder, or remove it if "
                    "it is not needed"
                )
        if self.arrow_output not in there:
            return None
        if len(there) < len(wanted):
            raise ValueError(
                f"the output {self.arrow_output} exists already, but {self.jsonl_output}, which "
                f"belongs to it, does not; remove {self.arrow_output} to prepare both again"
            )
        return load_json(self.arrow_output / PREPARATION)["report"]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Only one process at a time is in here for the same outputs; the others wait, and should
        ask again then."""
        file = self._lock_file()
        self.lock = file.fileno()
        try:
            yield
        finally:
            self.lock = None
            if self.arrow_output.exists():
                self._remove()
            file.close()

    def _lock_file(self) -> BinaryIO:
        while True:
            self.root.mkdir(parents=True, exist_ok=True)
            file = open(self.root / "lock", "wb")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info(f"another process is preparing {self.arrow_output}; waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
            # Whoever held the lock may have removed the folder in the meantime.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
                    return file
            file.close()

    @contextmanager
    def building(self) -> Iterator[None]:
        """Make the folders to work in and rename them at the end. A ValueError removes them; after
        any other end the finished bins stay."""
        self._report_others()
        try:
            self._make_folders()
            yield
            self._rename()
        except ValueError:
            self._remove()
            raise
        except BaseException:
            if not any(self._counts.glob("*[0-9]")):
                self._remove()
            else:
                logger.info(
                    f"finished parts are kept in {self.root}; the same command completes it"
                )
            raise

    def _make_folders(self) -> None:
        folders = [self.arrow, self._counts, self.scratch]
        # Ended between the two renames: the jsonl output is in its place already.
        if self.jsonl is not None and not self.jsonl_output.exists():
            if not self.jsonl.exists():
                shutil.rmtree(self._counts, ignore_errors=True)
            folders.append(self.jsonl)
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        save_json(self.made_from, self.root / MADE_FROM)

    @property
    def folders(self) -> list[Path]:
        """The folders that will be renamed."""
        return [path for path in (self.jsonl, self.arrow) if path is not None and path.exists()]

    def _report_others(self) -> None:
        arrow = self.arrow_output
        for other in sorted(arrow.parent.glob(f".{arrow.name}.*.tmp")):
            if other != self.root and (other / MADE_FROM).is_file():
                found = differences(load_json(other / MADE_FROM), self.made_from)
                logger.warning_once(
                    f"{other} holds an interrupted preparation ({found}); remove it if it is not "
                    "needed"
                )

    def counts(self, bin: Bin) -> Counts | None:
        """What ``store`` was given for ``bin``, None if it is not finished."""
        path = self._counts / _bin_name(bin)
        if not path.exists():
            return None
        try:
            with open(path, "rb") as file:
                found = _CountsUnpickler(file).load()
        except pickle.UnpicklingError:
            return None
        # Counts of another version of the library are of no use.
        known = vars(RowStats()).keys()
        return found if all(vars(stats).keys() == known for stats, _ in found.values()) else None

    def clear(self, bin: Bin) -> None:
        """Remove what an interrupted run may have left of the shards of ``bin``."""
        for shard in bin.shards:
            shutil.rmtree(self.arrow / shard, ignore_errors=True)
            if self.jsonl is not None:
                (self.jsonl / f"{shard}.jsonl").unlink(missing_ok=True)

    def store(self, bin: Bin, counts: Counts) -> None:
        """Mark ``bin`` as finished."""
        path = self._counts / _bin_name(bin)
        with open(path.with_suffix(".part"), "wb") as file:
            pickle.dump(counts, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path.with_suffix(".part"), path)

    def _rename(self) -> None:
        for folder in self.folders:
            save_json(self.made_from, folder / MADE_FROM)
        # The arrow folder comes last: training reads it, so where it is everything is.
        if self.jsonl is not None and self.jsonl.exists():
            os.rename(self.jsonl, self.jsonl_output)
        os.rename(self.arrow, self.arrow_output)
        self._remove()

    def _remove(self) -> None:
        for folder in filter(None, (self.root, self.jsonl, self.scratch)):
            shutil.rmtree(folder, ignore_errors=True)
        if self._cache is not None and self._made_cache:
            with suppress(OSError):  # it holds something else, or is not there
                self._cache.rmdir()


def _bin_name(bin: Bin) -> str:
    return bin.shards[0].replace("/", "-")


class _CountsUnpickler(pickle.Unpickler):
    """Reads counts, those of the first versions too, and nothing that could run."""

    known = {
        ("collections", "Counter"): Counter,
        (RowStats.__module__, "RowStats"): RowStats,
        (SampledRow.__module__, "SampledRow"): SampledRow,
        ("coati.dataset.tally", "Tally"): RowStats,
        ("coati.dataset.tally", "Shown"): SampledRow,
    }

    def find_class(self, module: str, name: str) -> type:
        if (module, name) in self.known:
            return self.known[module, name]
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into counts")
