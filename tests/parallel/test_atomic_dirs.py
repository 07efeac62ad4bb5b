"""Directories that are whole or absent."""

import errno
import os

import pytest

from coati.parallel import atomic_dirs as files
from coati.parallel.atomic_dirs import (
    SaveFailed,
    file_sizes,
    make_folder,
    write_directory,
    write_file,
)
from coati.parallel.checkpoint import clean
from tests.distributed.spawn import run


def write(folder, text: str = "new") -> None:
    make_folder(folder / "deep")
    write_file(folder / "deep" / "a", lambda path: path.write_text(text))
    write_file(folder / "b", lambda path: path.write_text(text))


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_directory_appears_whole_and_replaces_the_old_one(tmp_path):
    for text in ("old", "newer"):
        write_directory(tmp_path / "runs" / "final", lambda folder, text=text: write(folder, text))
        assert file_sizes(tmp_path / "runs" / "final") == {"b": len(text), "deep/a": len(text)}
    assert names(tmp_path / "runs") == ["final"]


def test_until_the_last_file_is_written_the_old_one_stands(tmp_path):
    write_directory(tmp_path / "final", lambda folder: write(folder, "old"))

    def look(folder):
        write(folder)
        assert (tmp_path / "final" / "b").read_text() == "old" and folder.name == ".final.tmp"

    write_directory(tmp_path / "final", look)
    assert (tmp_path / "final" / "b").read_text() == "new"


def test_what_an_interrupted_save_left_is_in_nobodys_way(tmp_path):
    (tmp_path / ".final.tmp").mkdir()
    (tmp_path / ".final.tmp" / "half").write_text("x")
    (tmp_path / ".final.old").mkdir()
    write_directory(tmp_path / "final", write)
    assert names(tmp_path) == ["final"] and set(file_sizes(tmp_path / "final")) == {"b", "deep/a"}


def test_a_failed_rename_puts_the_old_directory_back(tmp_path, monkeypatch):
    write_directory(tmp_path / "final", lambda folder: write(folder, "old"))
    replace = os.replace

    def refuse(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(SaveFailed, match="could not save"):
        write_directory(tmp_path / "final", write)
    assert names(tmp_path) == ["final"] and (tmp_path / "final" / "b").read_text() == "old"


def full(path) -> None:
    path.write_text("half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_a_failure_leaves_the_old_directory_and_says_what_to_do(tmp_path):
    write_directory(tmp_path / "final", lambda folder: write(folder, "old"))
    written = []

    def fail(folder):
        write_file(folder / "a", full)
        write_file(folder / "b", written.append)

    with pytest.raises(
        SaveFailed, match="rank 0: OSError: .*No space left.*--checkpoint_path auto"
    ):
        write_directory(tmp_path / "final", fail)
    assert (
        (tmp_path / "final" / "b").read_text() == "old"
        and names(tmp_path) == ["final"]
        and not written
    )


def test_an_error_between_files_is_a_failure_too(tmp_path):
    with pytest.raises(SaveFailed, match="ZeroDivisionError"):
        write_directory(tmp_path / "final", lambda folder: 1 / 0)
    assert names(tmp_path) == []
    with pytest.raises(ZeroDivisionError):  # outside of a directory nothing is kept for later
        write_file(tmp_path / "a", lambda path: 1 / 0)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveFailed, match="rank 0: "):
        write_directory(tmp_path / "file" / "final", write)


def save_with_a_full_disk(folder: str) -> list[str]:
    """In a worker: rank 1 fails in its first file, and all exchange something between the files."""
    from pathlib import Path

    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()

    def write(place):
        write_file(
            place / f"first-{rank}", full if rank == 1 else lambda path: path.write_text("x")
        )
        dist.barrier()
        write_file(place / f"second-{rank}", lambda path: path.write_text("x"))

    try:
        write_directory(Path(folder) / "final", write)
    except SaveFailed as error:
        return [str(error), *names(Path(folder))]
    return names(Path(folder))


def test_all_ranks_fail_together(tmp_path):
    first, second = run(
        2, "tests.parallel.test_atomic_dirs:save_with_a_full_disk", str(tmp_path), timeout=30
    )
    assert (
        "(rank 1: OSError: [Errno 28]" in first[0] and "(rank 1: OSError: [Errno 28]" in second[0]
    )
    assert first[1:] == second[1:] == []
    assert files._failures is None


@pytest.mark.parametrize("place", ["best", "modeling", "actor/modeling"])
def test_a_model_whose_replacement_was_interrupted_is_put_back(tmp_path, place):
    final = tmp_path / place
    old, new = (final.with_name(f".{final.name}.{end}") for end in ("old", "tmp"))
    write(old, "old")
    write(new, "half")
    clean(tmp_path)
    assert (final / "b").read_text() == "old" and names(final.parent) == [final.name]
    write(old, "older")
    clean(tmp_path)
    assert (final / "b").read_text() == "old" and names(final.parent) == [final.name]
