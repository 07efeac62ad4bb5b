"""Directories that are whole or absent, written by all ranks together."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from coati.parallel.save_causes import SaveCause, cause_of
from coati.utils.distributed import all_gather_object, broadcast_object, is_rank_0
from coati.utils.errors import RunFailed


class SaveFailed(RunFailed):
    """A rank could not write its part; nothing of the directory is left."""


_failures: list[SaveCause] | None = (
    None  # of this rank while it writes a directory; None: it writes none
)


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Every file of a checkpoint is written here, one after the other: ``write(path)``."""
    _or_later(lambda: write(path), path)


def make_folder(path: Path) -> None:
    """A folder inside a checkpoint; several ranks may make the same one."""
    _or_later(lambda: path.mkdir(parents=True, exist_ok=True), path)


def _or_later(work: Callable[[], object], path: Path) -> None:
    # Between two files the ranks gather tensors: one that went away with an error would leave the
    # others waiting. So inside write_directory a failure is kept until all are done, and nothing
    # more is written by this rank.
    if _failures is None:
        work()
    elif not _failures and (failure := attempt(work, path.parent, path.name)):
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
    failure = attempt(lambda: _make_fresh(temporary) if is_rank_0() else None, temporary)
    _agree(failure, final, temporary)
    failure = _write_all(write, temporary)
    _agree(failure, final, temporary)

    def publish() -> None:
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(final, old)
        try:
            os.replace(temporary, final)
        except OSError:
            if old.exists():
                os.replace(old, final)
            raise
        _sync(final.parent)
        shutil.rmtree(old, ignore_errors=True)

    failure = attempt(lambda: publish() if is_rank_0() else None, temporary)
    _agree(failure, final, temporary)


def _write_all(write: Callable[[Path], None], folder: Path) -> SaveCause | None:
    global _failures
    _failures = []
    try:
        failure = attempt(lambda: write(folder), folder)
        return _failures[0] if _failures else failure
    finally:
        _failures = None


def _make_fresh(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def attempt(work: Callable[[], object], folder: Path, file: str = "") -> SaveCause | None:
    """Run ``work``, which writes ``file`` into ``folder``; why it failed, or None."""
    try:
        work()
    # safetensors and torch.save wrap a full disk into error classes of their own, and a tokenizer
    # that cannot be saved raises what it likes.
    except Exception as error:
        return cause_of(error, folder, file)
    return None


def agreed_failure(failure: SaveCause | None) -> tuple[str, str] | None:
    """The failures of all ranks and what to do about the first, the same on every rank, which all
    must call it; None where there is none."""
    failures = all_gather_object(failure)
    if not any(failures):
        return None
    named = "; ".join(f"rank {who}: {one.text}" for who, one in enumerate(failures) if one)
    return named, next(one.remedy for one in failures if one)


def _agree(failure: SaveCause | None, final: Path, temporary: Path) -> None:
    if (agreed := agreed_failure(failure)) is not None:
        if is_rank_0():
            shutil.rmtree(temporary, ignore_errors=True)
        # A disk that has turned read-only keeps what was written.
        stays = broadcast_object(temporary.exists() if is_rank_0() else None)
        left = f"{temporary} is half-written" if stays else "Nothing half-written was left"
        named, remedy = agreed
        raise SaveFailed(
            f"could not save {final} ({named}). {left}; {remedy}. --checkpoint_path auto then goes "
            "on from the newest checkpoint"
        )


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
