"""The folders that a preparation makes: built beside their final names, kept when interrupted,
renamed when whole."""

import fcntl
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from coati.dataset.fingerprint import differences, digest
from coati.dataset.prepare.shard_plan import Bin
from coati.dataset.report.row_stats import Tally
from coati.utils.json_io import load_json, save_json
from coati.utils.logging import get_logger

logger = get_logger(__name__)

Counts = dict[str, tuple[Tally, int]]  # shard -> what became of its rows, rows written
MADE_FROM, PREPARATION = "made_from.json", "preparation.json"


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
        self.outputs, self.made_from, self.fingerprint = (
            (jsonl, arrow),
            made_from,
            digest(made_from),
        )
        self.root = arrow.with_name(f".{arrow.name}.{self.fingerprint}.tmp")
        self.arrow, self._counts = self.root / "arrow", self.root / "counts"
        self.jsonl = jsonl and jsonl.with_name(f".{jsonl.name}.{self.fingerprint}.tmp")
        self.scratch = (cache or self.root) / f".notes.{self.fingerprint}.tmp"
        self.lock: int | None = None

    def finished(self) -> dict[str, Any] | None:
        """The stored report when the outputs are there and made from the same; ValueError when from
        something else."""
        there = [path for path in self.outputs if path is not None and path.exists()]
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
        if self.outputs[1] not in there:
            return None
        if missing := [path for path in self.outputs if path is not None and path not in there]:
            raise ValueError(
                f"the output {there[0]} exists already, but {missing[0]}, which belongs to it, "
                "does not; remove "
                f"{there[0]} to prepare both anew"
            )
        return load_json(self.outputs[1] / PREPARATION)["report"]

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
            if self.outputs[1].exists():
                self._remove()
            file.close()

    def _lock_file(self) -> BinaryIO:
        while True:
            self.root.mkdir(parents=True, exist_ok=True)
            file = open(self.root / "lock", "wb")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info(f"another process is preparing {self.outputs[1]}; waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
            # Whoever held the lock may have removed the folder in the meantime.
            if _same_file(file, self.root / "lock"):
                return file
            file.close()

    @contextmanager
    def building(self) -> Iterator[None]:
        """The folders to work in, renamed at the end. A ValueError removes them; else the finished
        bins stay."""
        self._look_around()
        try:
            self._make_folders()
            yield
            self._rename()
        except ValueError:
            self._remove()
            raise
        except BaseException:
            if any(self._counts.glob("*[0-9]")):
                logger.info(
                    f"what is finished is kept in {self.root}; the same command completes it"
                )
            else:
                self._remove()
            raise

    def _make_folders(self) -> None:
        renamed = self.jsonl is not None and self.outputs[0].exists()
        if self.jsonl is not None and not renamed and not self.jsonl.exists():
            shutil.rmtree(self._counts, ignore_errors=True)
        for folder in filter(
            None, (self.arrow, self._counts, self.scratch, None if renamed else self.jsonl)
        ):
            folder.mkdir(parents=True, exist_ok=True)
        save_json(self.made_from, self.root / MADE_FROM)

    @property
    def folders(self) -> list[Path]:
        """What will be renamed."""
        return [
            folder for folder in (self.jsonl, self.arrow) if folder is not None and folder.exists()
        ]

    def _look_around(self) -> None:
        arrow = self.outputs[1]
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
        with open(path, "rb") as file:
            found = _Counts(file).load()
        # Counts of an older version of the library are of no use.
        known = vars(Tally()).keys()
        return found if all(vars(tally).keys() == known for tally, _ in found.values()) else None

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
            os.rename(self.jsonl, self.outputs[0])
        os.rename(self.arrow, self.outputs[1])
        self._remove()

    def _remove(self) -> None:
        for folder in filter(None, (self.root, self.jsonl, self.scratch)):
            shutil.rmtree(folder, ignore_errors=True)


def _same_file(file: BinaryIO, path: Path) -> bool:
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())


def _bin_name(bin: Bin) -> str:
    return bin.shards[0].replace("/", "-")


class _Counts(pickle.Unpickler):
    """Reads counts and nothing that could run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "Counter") or (
            module == Tally.__module__ and "." not in name
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong here")
