"""Whether outputs can be written, found out before anything is loaded. Imports nothing heavy."""

import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

# Flags that name a directory to be made, and flags that name a file.
DIRECTORIES = (
    "save_dir",
    "log_dir",
    "output_dir",
    "data_jsonl_output_dir",
    "data_arrow_output_dir",
    "data_cache_dir",
)
FILES = ("config_file", "output", "transcript", "histogram", "save_path")


def check_outputs(flags: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the flag, for an output that cannot be written."""
    for flag in (*DIRECTORIES, *FILES):
        path = flags.get(flag)
        if path is not None:
            try:
                _check(flag, str(path))
            except OSError as error:
                raise _cannot(flag, path, error.strerror) from error


def with_folder(path: str | os.PathLike) -> Path:
    """``path``, whose folder is made where it is not there."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return Path(path)


def open_like_folder(path: Path) -> None:
    """Let whoever may read and write ``path``'s folder do so with the file: safetensors makes files
    for their owner alone, whatever the umask. Where permissions cannot be set, it stays so."""
    with suppress(OSError):
        path.chmod(path.parent.stat().st_mode & 0o666)


def _check(flag: str, path: str) -> None:
    if not path or "\0" in path:
        wanted = "file" if flag in FILES else "directory"
        raise ValueError(f"--{flag} is {path!r}; name a {wanted}")
    there = Path(path)
    if any(len(os.fsencode(part)) > 255 for part in there.parts):
        raise ValueError(f"--{flag} {path[:40]}...: a name of more than 255 bytes; name another")
    if flag in FILES:
        if there.is_dir():
            raise ValueError(f"--{flag} {path} is a directory; name a file")
        there = there.parent
    elif there.is_file():
        raise ValueError(f"--{flag} {path} is a file; name a directory")
    while not os.path.lexists(there):
        there = there.parent
    os.stat(there)  # a circle of links
    if not there.is_dir():
        raise ValueError(f"--{flag} {path}: {there} is a file; name another place")
    with tempfile.TemporaryDirectory(dir=there, prefix=".coati-"):
        pass  # permissions say little to root, and nothing on a file system that is read-only


def _cannot(flag: str, path: Any, why: str | None) -> ValueError:
    return ValueError(f"--{flag} {path}: cannot be written ({why}); name another place")
