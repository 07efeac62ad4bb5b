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
