"""Logging of a run, shared by both training loops: metrics, evaluations, the best model so far,
peak memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coati.parallel.engine import Engine
from coati.parallel.launch import explained
from coati.parallel.weights import ModelAssets
from coati.trainer.best_checkpoint import save_best, value_of
from coati.trainer.early_stopping import EarlyStopping
from coati.trainer.run_report.run_record import RunRecord
from coati.trainer.schedule import RunSchedule, is_better
from coati.utils.distributed import is_rank_0
from coati.utils.environment import save_environment
from coati.utils.logging import get_logger
from coati.utils.memory import describe_memory, peak_memory_of_ranks
from coati.utils.meter import AccumulativeMeanMeter
from coati.utils.phases import phase
from coati.utils.run_identity import record_of
from coati.utils.tracker_table import named
from coati.utils.tracking import Tracker, make_tracker

logger = get_logger(__name__)


class RunLog:
    """Metrics and evaluations of one run.

    Args:
        name: the trainer's, which names the TensorBoard folder and the wandb project.
        schedule: its ``save_dir`` and ``metric_for_best`` are used.
        stored: the :meth:`state_dict` of the run that is resumed; {} for a new one.
        settings: the run's settings, for wandb and TensorBoard.
        default_metric: of early stopping, without a ``metric_for_best``.
    """

    def __init__(
        self,
        name: str,
        schedule: RunSchedule,
        stored: dict[str, Any],
        settings: dict[str, Any] | None = None,
        default_metric: str = "loss",
    ) -> None:
        self.name = name
        self.schedule = schedule
        self.settings = settings or {}
        self.tracker = Tracker()
        self.record = RunRecord(schedule.save_dir if is_rank_0() else None, name, self.settings)
        self.resumed = bool(stored)
        self.meter = AccumulativeMeanMeter()
        self.meter.load(stored.get("meter", []))
        evaluated = stored.get("evaluated", {})
        self.first_evaluation: dict[str, float] = evaluated.get("first", {})
        self.last_evaluation: dict[str, float] = evaluated.get("last", {})
        self.evaluated_at: int | None = evaluated.get("at")
        self.best: dict[str, float] = stored.get("best", {})  # {"value", "step"}
        self.stopping = EarlyStopping(schedule, default_metric, stored.get("early_stopping", {}))

    @phase("starting to log")
    def open(
        self,
        step: int,
        log_dir: str | None,
        use_wandb: bool,
        total: int,
        unit: str = "step",
        report_to: Sequence[str] = (),
    ) -> None:
        """Start logging to ``<save_dir>/metrics.jsonl``, and to TensorBoard (``log_dir``), wandb
        and those of ``report_to`` if asked for. Lines of an existing file that are later than
        ``step`` are removed. Every rank must call it.

        ``total``: the steps that the run is to have; ``unit``: what they are.
        """
        if step and step >= total:
            length = "--num_episodes" if unit == "episode" else "--max_steps or --max_epochs"
            logger.info(
                f"the checkpoint is of {unit} {step}, and the run has {total} in all: nothing is "
                f"left to train; a larger {length} goes on"
            )
        save_dir = self.schedule.save_dir
        if save_dir is None and not named(report_to, log_dir, use_wandb):
            return
        self.tracker = make_tracker(
            Path(save_dir) / "metrics.jsonl" if save_dir else None,
            None if log_dir is None else str(Path(log_dir) / self.name),
            use_wandb,
            report_to=report_to,
            project=f"Coati-{self.name}",
            config=self.settings,
            keep_to=step,
            run_id=record_of(save_dir).get("id") if save_dir else None,
        )
        if save_dir is not None:
            save_environment(save_dir)
        self.record.start(step, self.resumed, total=total, unit=unit)

    def evaluated(self, metrics: dict[str, float], step: int) -> None:
        """Log the metrics of an evaluation under ``eval/``."""
        self.last_evaluation = {f"eval/{name}": value for name, value in metrics.items()}
        self.first_evaluation = self.first_evaluation or self.last_evaluation
        self.evaluated_at = step
        self.tracker.log(self.last_evaluation, step)
        self.stopping.evaluated(self.last_evaluation, step)

    def stop_early(self, unit: str, step: int) -> bool:
        """Whether evaluations no longer improve; the reason is logged. Every rank must call it."""
        if not self.stopping.exhausted:
            return False
        reason = self.stopping.reason(unit)
        logger.info(f"{reason}: the run ends after {unit} {step}")
        self.record.note(reason, step, "note")
        return True

    def keep_best(
        self, engine: Engine, assets: ModelAssets, step: int, **position: int
    ) -> str | None:
        """Write ``<save_dir>/best`` if the last evaluation is the best so far; returns a message
        about it, or None. Every rank must call it. ``position``: what is stored beside the step.

        Raises:
            ValueError: for a ``metric_for_best`` that is not among the evaluation's metrics.
        """
        metric = self.schedule.metric_for_best
        if metric is None:
            return None
        value = value_of(metric, self.last_evaluation)
        # The initial model is never written as the best.
        started = step > 0 and all(position.values())
        better = is_better(metric, value, self.best.get("value"))
        if not started or self.schedule.save_dir is None or not better:
            return None
        self.best = {"value": value, "step": step}
        found = {"metric": metric, **position, **self.best}
        folder = save_best(self.schedule.save_dir, engine, assets, found)
        return f"the best {metric} so far, {value:.4f}; this model is in {folder}"

    def log_memory(self, step: int, speed: str = "") -> None:
        """Log the peak memory of every rank, and say it with the ``speed`` of the run. Every rank
        must call it."""
        peaks = peak_memory_of_ranks()
        self.tracker.log(
            {f"memory/rank_{rank}_peak_mb": peak for rank, peak in enumerate(peaks)}, step
        )
        if speed:
            logger.info(speed)
            self.record.note(speed, step, "note")
        logger.info(describe_memory(peaks))

    def what_is_kept(self) -> str:
        """What is left on disk, for the error message of a run that fails."""
        folder = self.schedule.save_dir
        return f"the last checkpoint in {folder} is untouched" if folder else "nothing was saved"

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs. Every rank must call it."""
        return {
            "meter": self.meter.state_of_ranks(),
            "evaluated": {
                "at": self.evaluated_at,
                "first": self.first_evaluation,
                "last": self.last_evaluation,
            },
            "best": self.best,
            "early_stopping": self.stopping.state_dict(),
        }

    def finish(self, step: int, stopped: bool, notes: Sequence[str] = ()) -> None:
        """The run has ended by itself, or was ``stopped``; ``notes`` stand in its report."""
        for note in notes:
            self.record.note(note, step, "note")
        self.record.end("stopped" if stopped else "finished", step)

    def fail(self, error: BaseException, step: int) -> None:
        """The run ends with ``error``, which its report says; of a collective that failed, which
        rank it lost."""
        error = explained(error)
        self.record.end("failed", step, f"{type(error).__name__}: {error}")

    @phase("finishing the logs")
    def close(self) -> None:
        """Finish the trackers' files."""
        self.tracker.close()
