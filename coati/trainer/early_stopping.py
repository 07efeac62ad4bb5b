"""Early stopping: a run ends when its evaluations no longer improve."""

from typing import Any

from coati.trainer.best_checkpoint import value_of
from coati.trainer.schedule import RunSchedule, is_better


class EarlyStopping:
    """Counts the evaluations in a row that did not improve on the best one.

    Args:
        schedule: its ``early_stopping_patience`` (None: never stops) and ``_threshold``, and
            ``metric_for_best``.
        default_metric: what is watched without a ``metric_for_best``.
        stored: the :meth:`state_dict` of the run that is resumed; {} for a new one.
    """

    def __init__(self, schedule: RunSchedule, default_metric: str, stored: dict[str, Any]) -> None:
        self.patience = schedule.early_stopping_patience
        self.threshold = schedule.early_stopping_threshold
        self.metric = schedule.metric_for_best or default_metric
        same = stored.get("metric") == self.metric
        self.best: float | None = stored.get("best") if same else None
        self.best_at: int | None = stored.get("best_at") if same else None
        self.count: int = stored.get("count", 0) if same else 0

    def evaluated(self, metrics: dict[str, float], step: int) -> None:
        """Take in an evaluation at ``step``; the one before training does not count.

        Raises:
            ValueError: for a metric that is not among the evaluation's.
        """
        if self.patience is None:
            return
        value = value_of(self.metric, metrics)
        if step == 0:
            return
        if is_better(self.metric, value, self.best, self.threshold):
            self.best = value
            self.best_at = step
            self.count = 0
        else:
            self.count += 1

    @property
    def exhausted(self) -> bool:
        """Whether the run is to end."""
        return self.patience is not None and self.count >= self.patience

    def reason(self, unit: str) -> str:
        """Why the run ends. ``unit``: what its evaluations count."""
        times = f"{self.count} evaluations" if self.count > 1 else "one evaluation"
        best = "there was none that is a number"
        if self.best is not None:
            best = f"the best was {self.best:.4f} at {unit} {self.best_at}"
        more = f" by more than {self.threshold:g}" if self.threshold else ""
        return (
            f"early stopping: {self.metric} has not improved{more} in {times} ({best}; "
            f"--early_stopping_patience {self.patience})"
        )

    def state_dict(self) -> dict[str, Any]:
        """As JSON keeps it exactly."""
        return {
            "metric": self.metric,
            "best": self.best,
            "best_at": self.best_at,
            "count": self.count,
        }
