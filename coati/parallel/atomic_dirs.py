"""Directories that are whole or absent, written by all ranks together."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from coati.utils.distributed import all_gather_object, barrier, is_rank_0, rank
from coati.utils.errors import RunFailed


class SaveFailed(RunFailed):
    """A rank could not write its part; nothing of the directory is left."""


_failures: list[str] | None = None  # of this rank while it writes a directory; None: it writes none


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Every file of a checkpoint is written here, one after the other: ``write(path)``."""
    _or_later(lambda: write(path))


def make_folder(path: Path) -> None:
    """A folder inside a checkpoint; several ranks may make the same one."""
    _or_later(lambda: path.mkdir(parents=True, exist_ok=True))


def _or_later(work: Callable[[], object]) -> None:
    # Between two files the ranks gather tensors: one that went away with an error would leave the
    # others waiting. So inside write_directory a failure is kept until all are done, and nothing
    # more is written by this rank.
    if _failures is None:
        work()
    elif not _failures and (failure := _attempt(work)):
        _failures.append(failure)


def temporary_name(final: Path) -> Path:
    """Where ``final`` is written before it is renamed: hidden, beside it, ending in ``.tmp``."""
    return final.with_name(f".{final.name}.tmp")


def write_directory(final: Path, write: Callable[[Path], None]) -> None:
    """Run ``write(folder)`` on every rank for a temporary folder, which becomes ``final`` when all
    have succeeded.

    An existing ``final`` is replaced. Every rank must call it; the ranks agree on success before
    any of them continues.

    Raises:
        SaveFailed: on every rank, naming the rank and its error; ``final`` is then as it was.
    """
    temporary = temporary_name(final)
    old = final.with_name(f".{final.name}.old")
    failure = _attempt(lambda: _make_fresh(temporary) if is_rank_0() else None)
    _agree(failure, final, temporary)
    failure = _write_all(write, temporary)
    _agree(failure, final, temporary)

    def publish() -> None:
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(final, old)
        os.replace(temporary, final)
        _sync(final.parent)
        shutil.rmtree(old, ignore_errors=True)

    _agree(_attempt(lambda: publish() if is_rank_0() else None), final, temporary)


def _write_all(write: Callable[[Path], None], folder: Path) -> str | None:
    global _failures
    _failures = []
    try:
        failure = _attempt(lambda: write(folder))
        return _failures[0] if _failures else failure
    finally:
        _failures = None


def _make_fresh(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _attempt(work: Callable[[], object]) -> str | None:
    try:
        work()
    # safetensors and torch.save wrap a full disk into error classes of their own.
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _agree(failure: str | None, final: Path, temporary: Path) -> None:
    failures = all_gather_object(failure)
    if any(failures):
        if is_rank_0():
            shutil.rmtree(temporary, ignore_errors=True)
        barrier()
        named = "; ".join(f"rank {who}: {text}" for who, text in enumerate(failures) if text)
        free = shutil.disk_usage(existing_folder(final.parent)).free / 2**30
        raise SaveFailed(
            f"could not save {final} ({named}); rank {rank()} sees {free:.2f} GiB free there. "
            "Nothing half-written was left; free space or choose another --save_dir, then resume "
            "with --checkpoint_path auto"
        )


def existing_folder(folder: Path) -> Path:
    """``folder``, or the nearest one above it that exists."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sizes(folder: Path) -> dict[str, int]:
    """Relative path -> bytes of every file below ``folder``."""
    return {
        str(f.relative_to(folder)): f.stat().st_size
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }
