"""When a run logs, evaluates, saves and ends."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RunSchedule:
    """Intervals in optimizer steps (PPO and GRPO: in episodes), 0 or None: never.

    ``eval_interval`` None: at the end of each epoch. ``metric_for_best``: the evaluation metric
    whose best model is kept.
    """

    save_dir: str | None = None
    save_interval: int = 0
    keep_last_k: int | None = None
    eval_interval: int | None = None
    log_interval: int = 1
    max_steps: int | None = None
    metric_for_best: str | None = None


LOWER_IS_BETTER = ("loss", "perplexity")


def is_better(metric: str, value: float, best: float | None) -> bool:
    """Whether ``value`` beats ``best`` (None: there is none yet); never when it is NaN."""
    if value != value:
        return False
    if best is None:
        return True
    return value < best if metric.rsplit("/", 1)[-1] in LOWER_IS_BETTER else value > best
