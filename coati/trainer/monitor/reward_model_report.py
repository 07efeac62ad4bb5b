"""An evaluated reward model in three lines, and whether PPO should start from it."""

import torch
from torch import Tensor

from coati.utils.statistics import wilson_interval

CHANCE = 0.5
USEFUL = 0.6  # accuracy from which PPO gains from a reward model


def verdict(chosen: Tensor, rejected: Tensor) -> list[str]:
    """Three lines about the scores (N,) of N pairs.

    Fit for PPO: accuracy above :data:`USEFUL`, above chance even at the low end of its interval,
    and chosen responses scored higher on average.
    """
    chosen = chosen.double()
    rejected = rejected.double()
    count = len(chosen)
    right = float(((torch.sign(chosen - rejected) + 1) / 2).sum())
    low, high = wilson_interval(right, count)
    accuracy = right / max(count, 1)
    apart = float(chosen.mean() - rejected.mean())
    spread = float(torch.cat([chosen, rejected]).std()) if count > 1 else 0.0
    deviations = apart / spread if spread > 0 else 0.0
    fit = accuracy > USEFUL and low > CHANCE and apart > 0
    positive = float((chosen > 0).double().mean())
    negative = float((rejected < 0).double().mean())
    centered = (
        ""
        if min(positive, negative) > CHANCE
        else " (scores are not centered on 0: --center_coef 0.01 does that)"
    )
    return [
        f"verdict: PPO {'can start' if fit else 'should not start'} from this reward model. "
        f"Accuracy {accuracy:.3f} on {count} pairs, 95% {low:.3f} to {high:.3f}: "
        f"{_against(accuracy, low)}",
        f"chosen responses score {float(chosen.mean()):.3f} on average, rejected ones "
        f"{float(rejected.mean()):.3f}: {deviations:+.2f} standard deviations apart",
        f"{positive:.0%} of the chosen scores are positive, {negative:.0%} of the rejected ones "
        f"negative{centered}",
    ]


def _against(accuracy: float, low: float) -> str:
    if low > USEFUL:
        return f"above {USEFUL} beyond doubt"
    if low > CHANCE:
        where = "above" if accuracy > USEFUL else "below"
        return f"better than chance ({CHANCE}), and {where} {USEFUL}, the least that PPO gains from"
    return (
        f"not shown to be better than chance ({CHANCE}); train on more pairs, or evaluate on more"
    )
