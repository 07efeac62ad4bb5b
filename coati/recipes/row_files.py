"""Rows that a Python caller holds, as files: what is prepared from them is prepared as any file
is."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

from coati.utils.user_cache import cache_root, hold

ACCEPTED = (
    "a list of rows (dicts, or lists of {role, content} messages), a datasets.Dataset, or paths"
)


def paths_of(data: Any, name: str) -> list[str]:
    """The paths that ``data`` means: those it names, else a file of its rows in the user's cache,
    whose name is a hash of them.

    ``data``: a path or several, rows, a data set, or a list of data sets. Every rank must call it.

    Raises:
        TypeError: for anything else.
        ValueError: for rows that JSON cannot hold, no rows, one conversation in place of several,
            and ranks that hold different rows.
    """
    if isinstance(data, str | os.PathLike):
        return [os.fspath(data)]
    if isinstance(data, Mapping):
        kind = "a dict of splits; give one of them" if _is_dataset(data) else "one dict"
        raise TypeError(f"{name} is {kind}; expected {ACCEPTED}")
    if not isinstance(data, Iterable):
        raise TypeError(f"{name} is {type(data).__name__}; expected {ACCEPTED}")
    if _is_dataset(data) or not isinstance(data, list | tuple):
        return [_file_of(data, name)]
    whole = (str, os.PathLike)
    if data and all(isinstance(each, whole) or _is_dataset(each) for each in data):
        return [path for each in data for path in paths_of(each, name)]
    if data and all(isinstance(row, Mapping) and "role" in row for row in data):
        raise ValueError(
            f"{name} is a single conversation; expected {ACCEPTED}: put it into a list of its own"
        )
    return [_file_of(data, name)]


def json_file(content: Any) -> str:
    """A file in the user's cache with ``content`` as JSON."""
    return _published([json.dumps(content)], ".json")


def _is_dataset(data: Any) -> bool:
    return type(data).__module__.split(".")[0] == "datasets"


def _file_of(rows: Iterable[Any], name: str) -> str:
    return _published(_lines(rows, name), ".jsonl")


def _lines(rows: Iterable[Any], name: str) -> Iterator[str]:
    count = 0
    for count, row in enumerate(rows, 1):
        if not isinstance(row, Mapping | list | tuple):
            raise ValueError(
                f"{name}[{count - 1}] is {type(row).__name__}; expected {ACCEPTED}"
                + ('; a prompt is {"prompt": text}' if isinstance(row, str) else "")
            )
        try:
            yield json.dumps(dict(row) if isinstance(row, Mapping) else row) + "\n"
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}[{count - 1}] cannot be written as JSON: {error}") from error
    if not count:
        raise ValueError(f"{name} holds no rows")


def _published(lines: Iterable[str], suffix: str) -> str:
    """The file of ``lines``, written by one process of each machine where it is not there yet; the
    others read their rows too, to know that they are the same."""
    from coati.utils.distributed import all_gather_object, raise_together

    writes = os.environ.get("LOCAL_RANK", "0") == "0"

    def write() -> Path:
        folder = _cache()
        digest = hashlib.sha256()
        with _partial_file(folder) if writes else nullcontext() as stream:
            for line in lines:
                digest.update(line.encode())
                if stream is not None:
                    stream.write(line)
            final = folder / f"{digest.hexdigest()[:24]}{suffix}"
            hold(final)
            # What is prepared of a file is known by the file's time: one that is there stays.
            if stream is not None and not final.exists():
                stream.flush()
                os.replace(stream.name, final)
        return final

    def checked() -> Path:
        try:
            return write()
        except OSError as error:
            raise ValueError(f"{_cache()}: rows cannot be written there ({error})") from error

    path = raise_together(checked)
    names = set(all_gather_object(path.name))
    if len(names) > 1:
        raise ValueError(
            f"the ranks hold {len(names)} different sets of rows; every process must be given the "
            "same, in the same order"
        )
    return str(path)


@contextmanager
def _partial_file(folder: Path) -> Iterator[IO[str]]:
    """A file in ``folder``, removed at the end unless it has got another name."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", prefix=".", suffix=".tmp", dir=folder, delete=False
    ) as stream:
        try:
            yield stream
        finally:
            Path(stream.name).unlink(missing_ok=True)


def _cache() -> Path:
    return cache_root() / "rows"
