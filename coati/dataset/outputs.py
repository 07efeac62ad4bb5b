"""Folders that appear under their names only when they are whole."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path


def check_outputs(*outputs: str | os.PathLike) -> None:
    """Raise ValueError for an output that exists, or is named twice."""
    if len({Path(path).resolve() for path in outputs}) < len(outputs):
        raise ValueError(f"{outputs[0]} is named for both the jsonl and the arrow output; name two folders")
    for path in outputs:
        if os.path.exists(path):
            raise ValueError(f"the output {path} exists already; name another folder, or remove it if it is not needed")


@contextmanager
def renamed_when_whole(outputs: list[Path], cache_dir: str | os.PathLike | None):
    """Folders to build in, renamed to ``outputs`` at the end; a failure leaves none of them behind."""
    folders = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in outputs]
    cache = (Path(cache_dir) if cache_dir is not None else outputs[-1].parent) / f".tokenized.{os.getpid()}.tmp"
    try:
        for folder in (*folders, cache):
            folder.mkdir(parents=True)
        yield folders, cache
        # The arrow folder comes last: training reads it, so where it is everything is.
        for folder, path in zip(folders, outputs, strict=True):
            os.rename(folder, path)
    finally:
        for folder in (*folders, cache):
            shutil.rmtree(folder, ignore_errors=True)
