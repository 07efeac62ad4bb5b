"""When a run logs, evaluates, saves and ends."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RunSchedule:
    """Intervals in optimizer steps (PPO and GRPO: in episodes), 0 or None: never.

    ``eval_interval`` None: at the end of each epoch. ``metric_for_best``: the evaluation metric
    whose best model is kept. ``early_stopping_patience``: evaluations in a row without an
    improvement of more than ``early_stopping_threshold`` that end the run.
    """

    save_dir: str | None = None
    save_interval: int = 0
    keep_last_k: int | None = None
    eval_interval: int | None = None
    log_interval: int = 1
    max_steps: int | None = None
    metric_for_best: str | None = None
    early_stopping_patience: int | None = None
    early_stopping_threshold: float = 0.0


LOWER_IS_BETTER = ("loss", "perplexity")


def is_better(metric: str, value: float, best: float | None, threshold: float = 0.0) -> bool:
    """Whether ``value`` beats ``best`` (None: there is none yet) by more than ``threshold``; never
    when it is NaN."""
    if value != value:
        return False
    if best is None:
        return True
    lower = metric.rsplit("/", 1)[-1] in LOWER_IS_BETTER
    return value < best - threshold if lower else value > best + threshold
