"""Learning-rate schedules: linear warm-up, then the shape that ``--lr_scheduler`` names.

Imports torch only to bind a schedule to an optimizer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coati.utils.logging import get_logger

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR

logger = get_logger(__name__)

FLOOR = 0.1  # of the peak learning rate, reached after the last step
DECAY = 0.2  # of the steps, at the end of wsd
DEFAULT = "cosine"
# --lr_scheduler -> what comes after the warm-up
SCHEDULES = {
    "cosine": "half a cosine from --lr to --lr_min_ratio of it",
    "linear": "a line from --lr to --lr_min_ratio of it",
    "constant": "--lr to the end",
    "wsd": "--lr, and over the last --decay_ratio of the steps a line to --lr_min_ratio of it",
}
DECAYING = tuple(name for name in SCHEDULES if name != "constant")


@dataclass(frozen=True)
class LRSchedule:
    """The shape of a schedule: a function of the step and the length of the run alone, so that a
    resumed run has the rate of its own flags from its first step on.

    ``warmup_steps`` None: 2.5% of all steps. ``min_ratio``: the share of the peak rate that a
    decaying schedule reaches after the last step. ``decay_ratio``: the share of all steps over
    which wsd decays (warmup-stable-decay, arXiv 2404.06395; its line, arXiv 2405.18392).
    """

    name: str = DEFAULT
    warmup_steps: int | None = None
    min_ratio: float = FLOOR
    decay_ratio: float = DECAY

    def warmup_of(self, total_steps: int) -> int:
        """Steps of warm-up in a run of ``total_steps``: one that leaves no step for what comes
        after it is cut to half the run, and logged."""
        if self.warmup_steps is None:
            return int(0.025 * total_steps)
        if self.warmup_steps < total_steps or total_steps <= 1:
            return self.warmup_steps
        cut = total_steps // 2
        logger.warning_once(
            f"--warmup_steps {self.warmup_steps} is not below the {total_steps} steps of this run: "
            f"cut to {cut}."
        )
        return cut

    def factor(self, total_steps: int) -> Callable[[int], float]:
        """Step (from 0) -> share of the peak rate: (t + 1) / warmup, then the shape.

        Raises ValueError for an unknown name.
        """
        warmup = self.warmup_of(total_steps)
        shape = _shape(self, total_steps, warmup)

        def factor(step: int) -> float:
            return (step + 1) / warmup if step < warmup else shape(step)

        return factor

    def bind(self, optimizer: "Optimizer", total_steps: int) -> "LambdaLR":
        """The schedule of ``optimizer`` over ``total_steps``; the rate of each of its groups is
        the peak rate."""
        from torch.optim.lr_scheduler import LambdaLR

        return LambdaLR(optimizer, self.factor(total_steps))


def _shape(schedule: LRSchedule, total: int, warmup: int) -> Callable[[int], float]:
    floor = schedule.min_ratio
    decaying = max(1, round(schedule.decay_ratio * total))

    def progress(step: int, first: int) -> float:
        return min(1.0, max(0, step - first) / max(1, total - first))

    shapes: dict[str, Callable[[int], float]] = {
        "cosine": lambda step: (
            floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress(step, warmup)))
        ),
        "linear": lambda step: 1 - (1 - floor) * progress(step, warmup),
        "constant": lambda step: 1.0,
        "wsd": lambda step: 1 - (1 - floor) * progress(step, max(warmup, total - decaying)),
    }
    if schedule.name not in shapes:
        raise ValueError(f"lr_scheduler {schedule.name!r}: choose from {', '.join(SCHEDULES)}")
    return shapes[schedule.name]


def set_position(scheduler: "LambdaLR", optimizer: "Optimizer", step: int) -> None:
    """Stand where ``step`` optimizer steps have been taken: the rates of the next one, of this
    schedule's own peak rates and length, are in ``optimizer`` at once."""
    scheduler.last_epoch = step
    scheduler._step_count = step + 1
    rates = [
        peak * factor(step)
        for peak, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    scheduler._last_lr = rates
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
