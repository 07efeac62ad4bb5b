"""What a rank of these tests does: the script's own main, with a fault at a chosen moment."""

import contextlib
import errno
import io
import os
import runpy
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

SCRIPTS = Path(__file__).parents[2] / "examples" / "training_scripts"


@dataclass(frozen=True)
class Fault:
    """What goes wrong, where and when, on ``rank``.

    ``at``: "update" (of one model's weights, inside a step), "step", "rollout" (a batch of prompts
    answered and judged), "file" (one that a save writes) or "rename" (of a directory), the
    ``count``-th since the process started;
    ``moment``: "before" it, "half" (of a file's bytes) or "after". ``what``: "kill" (-9), "term"
    (SIGTERM), "full" (no space left on device), "nan" (in the loss, at each micro-batch).
    """

    at: str
    count: int = 1
    moment: str = "before"
    what: str = "kill"
    rank: int = 0

    def strike(self) -> None:
        if self.what == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.kill(os.getpid(), signal.SIGKILL if self.what == "kill" else signal.SIGTERM)


@dataclass(frozen=True)
class Run:
    """One run of a script: its words, a fault, and where to put what :func:`copied` takes."""

    words: list[str]
    fault: Fault | None = None
    copies: str | None = None
    script: str = "train_sft.py"


@dataclass
class Ended:
    """How a run ended on this rank: exit code, standard error, and the rows of each window (of all
    ranks)."""

    code: int
    err: str
    rows: list[list[int]]


def train(run: Run) -> Ended:
    """A script as its last lines run it, once."""
    rows: list[list[int]] = []
    text, code, rank = io.StringIO(), 0, int(os.environ.get("RANK", "0"))
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stderr(text))
        stack.enter_context(patch.object(sys, "argv", [str(SCRIPTS / run.script), *run.words]))
        stack.enter_context(rows_seen(rows))
        if run.fault is not None and run.fault.rank == rank:
            stack.enter_context(struck_by(run.fault))
        if run.copies is not None:
            stack.enter_context(
                copied(run.words[run.words.index("--save_dir") + 1], Path(run.copies), rank)
            )
        try:
            run_script(run.script)
        except SystemExit as stop:
            code = stop.code or 0
    print(text.getvalue(), file=sys.stderr)
    return Ended(code, text.getvalue(), rows)


def train_each(runs: dict[str, Run]) -> dict[str, Ended]:
    """Several runs, one after the other, in one process group."""
    with patch("coati.parallel.launch.shut_down"):
        return {name: train(run) for name, run in runs.items()}


def run_script(name: str) -> None:
    """As ``python name`` does it; the words are in ``sys.argv``."""
    runpy.run_path(str(SCRIPTS / name), run_name="__main__")


@contextlib.contextmanager
def rows_seen(rows: list[list[int]]) -> Iterator[None]:
    from coati.trainer.base import SLTrainer

    original = SLTrainer._step

    def step(self, window, loader, *others):
        rows.append(loader.rows_at(self.state.epoch, self.state.sample_start_index))
        return original(self, window, loader, *others)

    with patch.object(SLTrainer, "_step", step):
        yield


def struck_by(fault: Fault) -> contextlib.AbstractContextManager:
    """The context in which the fault strikes."""
    from coati.experience_maker.maker import NaiveExperienceMaker
    from coati.parallel.engine import Engine
    from coati.trainer.base import SLTrainer
    from coati.trainer.sft import SFTObjective

    seen = 0
    calls = {
        "update": (Engine, "_update"),
        "step": (SLTrainer, "_step"),
        "rollout": (NaiveExperienceMaker, "make_experience"),
    }

    def strike_if_due(moment: str) -> None:
        nonlocal seen
        seen += moment == "before"
        if seen == fault.count and moment == fault.moment:
            fault.strike()

    def spoiled(result):
        nonlocal seen
        seen += 1
        return (result[0] * float("nan"), result[1]) if seen == fault.count else result

    if fault.what == "nan":
        return replaced(
            SFTObjective, "loss", lambda original: lambda *args: spoiled(original(*args))
        )
    if fault.at in calls:
        return replaced(*calls[fault.at], lambda original: around(original, strike_if_due))
    if fault.at == "rename":
        return directories_renamed(lambda moment, path: strike_if_due(moment))
    return files_written(lambda moment, path: strike_if_due(moment))


@contextlib.contextmanager
def copied(save_dir: str, copies: Path, rank: int) -> Iterator[None]:
    """Copy ``save_dir`` at every moment of a save at which this rank could be killed: what the disk
    would hold then.

    From the second checkpoint on, when there is something to lose. Of the final model only the
    weights and the rename.
    """
    copies.mkdir(parents=True, exist_ok=True)
    count = 0

    def copy(moment: str, path: Path) -> None:
        nonlocal count
        final = path.parent.name == ".modeling.tmp" and path.suffix != ".safetensors"
        if final or not list(Path(save_dir).glob("epoch-*")):
            return
        count += 1
        name = f"{count:03d} rank {rank} {moment} {path.parent.name} {path.name}"
        shutil.copytree(save_dir, copies / name.replace("/", "-"), copy_function=copy_if_there)

    with (
        files_written(copy),
        directories_renamed(copy),
        replaced(shutil, "rmtree", lambda f: half_removed(f, copy)),
    ):
        yield


def copy_if_there(source: str, target: str) -> None:
    # Another rank may rename a temporary file of its own meanwhile.
    with contextlib.suppress(FileNotFoundError):
        shutil.copy2(source, target)


def half_removed(original: Callable, copy: Callable[[str, Path], None]) -> Callable:
    """rmtree that stops half-way for a copy of what is left."""

    def rmtree(folder, *args, **kwargs):
        files = [file for file in Path(folder).rglob("*") if file.is_file()]
        for file in files[::2]:
            file.unlink()
        if files:
            copy("half removed", Path(folder))
        original(folder, *args, **kwargs)

    return rmtree


@contextlib.contextmanager
def files_written(call: Callable[[str, Path], None]) -> Iterator[None]:
    """``call(moment, path)`` before, half-way through and after every file of a save."""
    from coati.parallel import atomic_dirs as files
    from coati.parallel import checkpoint, weights

    original = files.write_file

    def write_file(path: Path, write: Callable[[Path], object]) -> None:
        def disturbed(path: Path) -> None:
            call("before", path)
            write(path)
            whole = path.read_bytes()
            os.truncate(path, len(whole) // 2)
            call("half", path)
            path.write_bytes(whole)
            call("after", path)

        original(path, disturbed)

    with contextlib.ExitStack() as stack:
        for module in (checkpoint, files, weights):
            stack.enter_context(patch.object(module, "write_file", write_file))
        yield


@contextlib.contextmanager
def directories_renamed(call: Callable[[str, Path], None]) -> Iterator[None]:
    """``call(moment, path)`` before and after a directory gets another name."""

    def wrapped(original: Callable) -> Callable:
        def rename(source, target, *args, **kwargs):
            if not os.path.isdir(source):
                return original(source, target, *args, **kwargs)
            call("before", Path(target))
            result = original(source, target, *args, **kwargs)
            call("after", Path(target))
            return result

        return rename

    with replaced(os, "replace", wrapped), replaced(os, "rename", wrapped):
        yield


def around(original: Callable, call: Callable[[str], None]) -> Callable:
    def wrapped(*args, **kwargs):
        call("before")
        result = original(*args, **kwargs)
        call("after")
        return result

    return wrapped


def replaced(
    owner: Any, name: str, wrap: Callable[[Callable], Callable]
) -> contextlib.AbstractContextManager:
    return patch.object(owner, name, wrap(getattr(owner, name)))
