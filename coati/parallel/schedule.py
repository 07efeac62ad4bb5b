"""The learning-rate schedule of every trainer."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from coati.utils.logging import get_logger

logger = get_logger(__name__)

FLOOR = 0.1  # of the peak learning rate, reached at the last step


def cosine_with_warmup(
    optimizer: Optimizer, total_steps: int, warmup_steps: int | None = None
) -> LambdaLR:
    """Linear warm-up (t + 1) / warmup, then cosine to 0.1 of the peak at ``total_steps`` optimizer
    steps.

    ``warmup_steps`` None means 2.5% of ``total_steps``. A warm-up that leaves no step for the
    cosine is cut to half the run, and said.
    """
    if warmup_steps is None:
        warmup_steps = int(0.025 * total_steps)
    if warmup_steps >= total_steps > 1:
        cut = total_steps // 2
        logger.info(
            f"--warmup_steps {warmup_steps} is not below the {total_steps} steps of this run: cut "
            f"to {cut}."
        )
        warmup_steps = cut

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)
