"""Where the library keeps what it can make again: ``$XDG_CACHE_HOME/coati``, by default
``~/.cache/coati``, and how much of it.

What a process uses it holds by a shared lock on a file in ``locks``, so that no other removes it.
The time of that file is when it was used last.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from coati.utils.logging import get_logger

logger = get_logger(__name__)

# Subfolder -> what is in it.
CONTENTS = {
    "rows": "rows that were given in Python, as files",
    "prepared": "raw files given to training, tokenized",
    "reference": "log-probs of reference models, for rows whose folder cannot be written",
    "judge": "verdicts of the judges of rewards",
    "layouts": "which layout of weights decodes fastest on this machine",
}
LIMIT_VARIABLE = "COATI_CACHE_GIB"
LIMIT_GIB = 20.0
LEFT_S = 86400.0  # a half-written file of which nothing has come in this time is a remnant
_held: dict[Path, IO[bytes]] = {}  # by this process, until it ends


def cache_root() -> Path:
    """The folder of all caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coati"


def limit_gib() -> float:
    """How much may be kept; infinite for a limit of 0. Raises ValueError naming the variable."""
    text = os.environ.get(LIMIT_VARIABLE, "")
    try:
        limit = float(text or LIMIT_GIB)
    except ValueError:
        limit = -1.0
    if not limit >= 0:
        raise ValueError(
            f"the environment variable {LIMIT_VARIABLE} is {text!r}; expected a number of GiB, 0 "
            "for no limit"
        )
    return limit or float("inf")


@dataclass(frozen=True)
class Entry:
    """One thing that is kept. ``used``: when, in seconds since the epoch."""

    path: Path
    size: int
    used: float

    @property
    def kind(self) -> str:
        """A key of :data:`CONTENTS`."""
        return self.path.parent.name

    @property
    def in_use(self) -> bool:
        """By a process that is running, this one too."""
        if not _lock_of(self.path).exists():
            return False
        with _exclusively(self.path) as alone:
            return not alone

    def remove(self) -> bool:
        """Remove it unless it is in use; whether it is gone."""
        with _exclusively(self.path) as alone:
            if alone:
                shutil.rmtree(self.path) if self.path.is_dir() else self.path.unlink()
                _lock_of(self.path).unlink(missing_ok=True)
        return alone


def entries() -> list[Entry]:
    """What is kept, what was used longest ago first."""
    found = []
    for kind in CONTENTS:
        folder = cache_root() / kind
        for path in folder.iterdir() if folder.is_dir() else ():
            # What is being made: a folder says by its lock whether it still is, a file by its age.
            with suppress(FileNotFoundError):  # removed meanwhile
                entry = _entry(path)
                made = not path.name.startswith(".") or path.is_dir()
                if made or time.time() - entry.used > LEFT_S:
                    found.append(entry)
    return sorted(found, key=lambda entry: entry.used)


def _entry(path: Path) -> Entry:
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    stats = [file.stat() for file in files]
    lock = _lock_of(path)
    times = [stat.st_mtime for stat in stats] + ([lock.stat().st_mtime] if lock.exists() else [])
    return Entry(path, sum(stat.st_size for stat in stats), max(times))


def hold(path: Path) -> None:
    """This process uses ``path``, which may still have to be made, from now until it ends."""
    limit_gib()  # a wrong one is said before anything is made
    if path in _held:
        return
    with suppress(OSError):  # a folder that cannot be written holds what nobody removes
        _lock_of(path).parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = open(_lock_of(path), "ab")  # noqa: SIM115
            fcntl.flock(file, fcntl.LOCK_SH)
            # Whoever removed the entry has removed its lock, too.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
                    os.utime(file.name)
                    _held[path] = file
                    return
            file.close()


def trim() -> None:
    """Remove what was used longest ago, nothing that is in use, until the limit holds; said once
    for all."""
    limit = limit_gib() * 2**30
    found = entries()
    total = sum(entry.size for entry in found)
    removed = []
    for entry in found:
        if total <= limit:
            break
        with suppress(OSError):
            if entry.remove():
                removed.append(entry)
                total -= entry.size
    if removed:
        days = (time.time() - removed[-1].used) / 86400
        logger.info(
            f"{cache_root()} is kept below {limit / 2**30:g} GiB ({LIMIT_VARIABLE}): "
            f"{len(removed)} entries of {sum(entry.size for entry in removed) / 2**30:.1f} GiB, "
            f"not used for {days:.0f} days or longer, are removed and would be made again"
        )


def _lock_of(path: Path) -> Path:
    if path.name.startswith(".") and path.is_dir():  # an interrupted preparation has its own
        return path / "lock"
    return cache_root() / "locks" / f"{path.parent.name}-{path.name}"


@contextmanager
def _exclusively(path: Path) -> Iterator[bool]:
    """Whether no process holds ``path``; none can meanwhile."""
    lock = _lock_of(path)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
