"""Experiment trackers: a JSON-lines file, and those of :data:`~coati.utils.tracker_table.TRACKERS`
that are asked for. All have ``log(metrics, step)``, and ``table(columns, rows, step)`` for
samples."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coati.utils.distributed import is_rank_0
from coati.utils.logging import get_logger
from coati.utils.tracker_table import TRACKERS, named

logger = get_logger(__name__)


class Tracker:
    """Several trackers as one. Of none, what ranks other than 0 have, it keeps nothing. One that
    cannot be written, on a disk that is full say, does not end the training: it is said once.
    """

    place = "the log of metrics"  # for messages

    def __init__(self, trackers: Sequence["Tracker"] = ()) -> None:
        self._trackers = trackers

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._each(lambda tracker: tracker.log(metrics, step))

    def table(self, columns: list[str], rows: list[list], step: int, name: str = "samples") -> None:
        self._each(lambda tracker: tracker.table(columns, rows, step, name))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())

    def _each(self, work: Callable[["Tracker"], None]) -> None:
        for tracker in self._trackers:
            try:
                work(tracker)
            except OSError as error:
                logger.warning_once(
                    f"warning: {tracker.place} could not be written ({error.strerror or error}): "
                    "metrics are missing there; training goes on, but may not be able to save "
                    "either"
                )


class JsonlTracker(Tracker):
    """``metrics.jsonl``: one object per report, ``{"step": ..., name: value, ...}``;
    ``samples.jsonl`` beside it: one per row of a table, without what the row lacks, and with the
    table's name where it is not "samples".

    ``keep_to`` cuts an existing file back to the reports up to that step: those after the
    checkpoint that a resumed run starts from would otherwise be there twice. 0 is a run from the
    start, which keeps none.
    """

    def __init__(self, path: str | os.PathLike, keep_to: int = 0) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.place = str(path)
        _cut(path, keep_to)
        self._file = open(path, "a", encoding="utf-8")
        self._samples = path.with_name("samples.jsonl")
        if self._samples.exists():
            _cut(self._samples, keep_to)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()

    def table(self, columns: list[str], rows: list[list], step: int, name: str = "samples") -> None:
        with open(self._samples, "a", encoding="utf-8") as file:
            for row in rows:
                held = {
                    name: value
                    for name, value in zip(columns, row, strict=True)
                    if value is not None
                }
                of = {} if name == "samples" else {"table": name}
                file.write(json.dumps({"step": step, **of, **held}, ensure_ascii=False) + "\n")

    def close(self) -> None:
        self._file.close()


def _cut(path: Path, keep_to: int) -> None:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    # A run killed while writing leaves half a line at the end.
    kept = [
        line
        for line in lines
        if keep_to and line.endswith("}\n") and json.loads(line)["step"] <= keep_to
    ]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


class TensorBoardTracker(Tracker):
    """TensorBoard; ``config`` stands in its text tab."""

    def __init__(
        self, log_dir: str | os.PathLike, config: dict[str, Any], keep_to: int = 0
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.place = f"--log_dir {log_dir}"
        self._writer = SummaryWriter(str(log_dir), purge_step=keep_to + 1 if keep_to else None)
        if config:
            rows = [[name, value] for name, value in config.items()]
            self._writer.add_text("settings", _markdown(["setting", "value"], rows), keep_to)

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def table(self, columns: list[str], rows: list[list], step: int, name: str = "samples") -> None:
        self._writer.add_text(name, _markdown(columns, rows), step)

    def close(self) -> None:
        self._writer.close()


def _markdown(columns: list[str], rows: list[list]) -> str:
    cells = [columns, ["---"] * len(columns), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _cell(value: Any) -> str:
    """``value`` in a cell of a Markdown table."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")


class WandbTracker(Tracker):
    """wandb, online or (``WANDB_MODE=offline``) not; its own login decides.

    ``run_id``: goes on in the wandb run of that id, or makes it; None: a new one. What a resumed
    run logs again, for steps that wandb has seen, is left out: wandb takes no step twice.
    """

    def __init__(
        self,
        project: str,
        config: dict[str, Any],
        log_dir: str | os.PathLike | None,
        run_id: str | None = None,
    ) -> None:
        import wandb

        same = {} if run_id is None else {"id": run_id, "resume": "allow"}
        self._run = wandb.init(
            project=project, config=config, dir=None if log_dir is None else str(log_dir), **same
        )
        if same and getattr(self._run, "resumed", False):
            # Flags may have changed; wandb keeps the first value otherwise.
            self._run.config.update(config, allow_val_change=True)
        self._table = wandb.Table

    def log(self, metrics: dict[str, Any], step: int) -> None:
        if step >= getattr(self._run, "step", 0):
            self._run.log(metrics, step=step)

    def table(self, columns: list[str], rows: list[list], step: int, name: str = "samples") -> None:
        self.log({name: self._table(columns=columns, data=rows)}, step)

    def close(self) -> None:
        self._run.finish()


class TrackioTracker(Tracker):
    """trackio: a local database (``TRACKIO_DIR``), or what ``TRACKIO_SPACE_ID`` names.

    ``run_id``: names the run, which a resumed one goes on in; None: a new one, of trackio's
    choosing. What is logged again, for steps that the run has, is left out.
    """

    def __init__(self, project: str, config: dict[str, Any], run_id: str | None = None) -> None:
        import trackio

        same = {} if run_id is None else {"name": run_id, "resume": "allow"}
        self._run = trackio.init(project=project, config=config, embed=False, **same)
        self._next = getattr(self._run, "_next_step", 0) if same else 0
        self._table = trackio.Table
        self._finish = trackio.finish

    def log(self, metrics: dict[str, Any], step: int) -> None:
        if step >= self._next:
            self._run.log(metrics, step=step)

    def table(self, columns: list[str], rows: list[list], step: int, name: str = "samples") -> None:
        self.log({name: self._table(columns=columns, data=rows)}, step)

    def close(self) -> None:
        self._finish()


@dataclass(frozen=True)
class _Start:
    """What a tracker is started with; arguments of :func:`make_tracker`."""

    log_dir: str | os.PathLike | None
    project: str
    config: dict[str, Any]
    keep_to: int
    run_id: str | None


def _tensorboard(start: _Start) -> Tracker:
    if start.log_dir is None:
        raise ValueError("TensorBoard needs a log_dir")
    return TensorBoardTracker(start.log_dir, start.config, start.keep_to)


_MAKERS: dict[str, Callable[[_Start], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": lambda start: WandbTracker(start.project, start.config, start.log_dir, start.run_id),
    "trackio": lambda start: TrackioTracker(start.project, start.config, start.run_id),
}


def make_tracker(
    metrics_file: str | os.PathLike | None,
    log_dir: str | os.PathLike | None = None,
    use_wandb: bool = False,
    *,
    report_to: Sequence[str] = (),
    project: str = "coati",
    config: dict[str, Any] | None = None,
    keep_to: int = 0,
    run_id: str | None = None,
) -> Tracker:
    """The trackers asked for, on rank 0; an empty one elsewhere.

    ``report_to``: names of :data:`~coati.utils.tracker_table.TRACKERS`, beside TensorBoard, which a
    ``log_dir`` asks for, and wandb. ``config``: the run's settings, which they show. ``run_id``: of
    the run through all its starts.
    """
    if not is_rank_0():
        return Tracker()
    trackers: list[Tracker] = []
    if metrics_file is not None:
        trackers.append(JsonlTracker(metrics_file, keep_to))
    start = _Start(log_dir, project, config or {}, keep_to, run_id)
    asked = named(report_to, log_dir, use_wandb)
    trackers += [_MAKERS[name](start) for name in TRACKERS if name in asked]
    return Tracker(trackers)
