"""The directory of a run: who may write there, what lies there, and where the run began."""

import atexit
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coati.cli.settings import OutputSettings
from coati.trainer.run_report.run_files import EVENTS, JsonLines
from coati.utils.dir_lock import DirLock
from coati.utils.distributed import broadcast_object, is_rank_0, raise_together
from coati.utils.json_io import save_json
from coati.utils.run_identity import RECORD, record_of

_held: dict[Path, DirLock] = {}  # by this process


def lock_save_dir(output: OutputSettings) -> None:
    """One run at a time writes into ``--save_dir``; a ``--dry_run`` writes nothing there. Every
    rank must call it; rank 0 holds the lock until :func:`release_locks`.

    Raises ValueError on every rank, naming the run that holds it.
    """
    if not output.dry_run:
        raise_together(lambda: _lock(output.save_dir) if is_rank_0() else None)


def _lock(save_dir: str) -> None:
    place = Path(save_dir).absolute()
    if place in _held:  # the same call again, in a notebook
        return
    lock = DirLock(save_dir, "--save_dir")
    lock.acquire()
    if not _held:
        atexit.register(release_locks)
    _held[place] = lock


def release_locks() -> None:
    """Give back what this process holds."""
    while _held:
        _held.popitem()[1].release()


@contextmanager
def locks_released() -> Iterator[None]:
    """Whatever ends the block, what was locked inside is given back."""
    try:
        yield
    finally:
        release_locks()


def finished_models(save_dir: str) -> list[Path]:
    """The final models in ``save_dir``, the policy's first."""
    return [
        folder
        for name in ("modeling", "actor/modeling")
        if (folder := Path(save_dir) / name).is_dir()
    ]


def refuse_shorter(output: OutputSettings, total: int, unit: str = "step") -> None:
    """A run of ``total`` steps (or episodes) does not replace the final model of a longer one that
    went on from the same checkpoint. Every rank must call it."""
    done = broadcast_object(_finished_at(output.save_dir) if is_rank_0() else None)
    if done > total and not output.dry_run:
        flag = "--num_episodes" if unit == "episode" else "--max_steps or --max_epochs"
        raise ValueError(
            f"--save_dir {output.save_dir} holds the final model of {unit} {done}; this run would "
            f"end with {unit} {total} and replace it. Give a larger {flag}, choose another "
            "--save_dir, or remove that model"
        )


def _finished_at(save_dir: str) -> int:
    """The step of the final model in ``save_dir``; 0 where there is none, or it is not known."""
    if not finished_models(save_dir):
        return 0
    events = JsonLines(Path(save_dir) / EVENTS).read_on()
    steps = [event.get("step") for event in events if event.get("event") == "finished"]
    return steps[-1] if steps and isinstance(steps[-1], int) else 0


def record_run(output: OutputSettings, began: dict[str, str], goes_on: bool) -> None:
    """Write ``run.json`` on rank 0. A run that ``goes_on`` in its directory keeps its own."""
    if output.dry_run or not is_rank_0() or (goes_on and record_of(output.save_dir)):
        return
    save_json({"id": uuid.uuid4().hex[:12], **began}, Path(output.save_dir) / RECORD)
