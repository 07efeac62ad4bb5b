"""Training diagnostics of preference runs: each finding is reported once, with what to look at."""

import math
from typing import Any

from torch import Tensor

from coati.parallel.objective import Metrics
from coati.utils.distributed import all_gather_object
from coati.utils.meter import MaskedSamples, sum_and_count, to_floats
from coati.utils.statistics import correlation, wilson_interval

EVERY = 10  # optimizer steps between looks
PATIENCE = 50  # optimizer steps before anything is reported
LN2 = math.log(2)


def moments(reward: Tensor, length: Tensor, mask: Tensor | None = None) -> Metrics:
    """Private metrics (their names begin with "_", nobody logs them) that give the correlation of
    ``reward`` and ``length``, (R,) each, over the rows of ``mask`` (R,)."""
    reward = reward.detach().float()
    length = length.float()
    if mask is not None:  # what is not counted may be NaN
        reward = reward.masked_fill(~mask, 0.0)
    found = {
        "_x": reward,
        "_y": length,
        "_xx": reward**2,
        "_yy": length**2,
        "_xy": reward * length,
    }
    if mask is None:
        return found
    return {name: MaskedSamples(values, mask) for name, values in found.items()}


class PreferenceChecks:
    """Watches the steps of a run. ``ln2_is_chance``: the loss is ln 2 where nothing is told apart.

    ``accuracy``: the name of the metric that is 1 for a pair in the right order.
    """

    def __init__(self, ln2_is_chance: bool, accuracy: str = "accuracy") -> None:
        self.ln2_is_chance = ln2_is_chance
        self.accuracy = accuracy
        self._sums: dict[str, Any] = {}  # tensors stay on their device between looks
        self._looks: list[dict[str, float]] = []
        self._said: set[str] = set()

    def add(
        self, metrics: dict[str, list], loss: float, num_terms: int, is_loss_rank: bool
    ) -> None:
        """One optimizer step: this rank's samples, the loss per term and the terms of all ranks."""
        step: dict[str, Any] = {"_loss": loss * num_terms, "_units": num_terms, "_steps": 1.0}
        if is_loss_rank:
            for name, samples in metrics.items():
                totals = [sum_and_count(values) for values in samples]
                step[name] = sum(total for total, _ in totals)
                step[f"{name}#"] = sum(count for _, count in totals)
        for name, value in step.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def look(self) -> list[str]:
        """What is to be said now. Every rank calls it, after each step; the ranks meet every
        :data:`EVERY` steps."""
        if self._sums.get("_units") == 0:
            return self._once(
                "zero",
                "nothing in these steps is supervised: no pair has a marked token on both sides",
            )
        if self._sums.get("_steps", 0) < EVERY:
            return []
        mine = dict(zip(self._sums, to_floats(self._sums.values()), strict=True))
        everyone = all_gather_object(mine)
        total = {
            name: sum(sums.get(name, 0.0) for sums in everyone) for name in set().union(*everyone)
        }
        # All ranks have these alike.
        total |= {name: mine[name] for name in ("_loss", "_units", "_steps")}
        self._looks.append(total)
        self._sums = {}
        if len(self._looks) * EVERY < PATIENCE:
            return []
        recent = self._looks[-PATIENCE // EVERY :]
        over = {name: sum(look.get(name, 0.0) for look in recent) for name in total}
        return [*self._loss(over), *self._chance(over), *self._falling(), *self._length(over)]

    def _loss(self, over: dict[str, float]) -> list[str]:
        loss = over["_loss"] / max(over["_units"], 1)
        if not self.ln2_is_chance or abs(loss - LN2) > 0.01:
            return []
        return self._once(
            "ln2",
            f"the loss is still ln 2 ({loss:.4f}) after {PATIENCE} steps: nothing is being "
            "learned. Raise --lr, and look at pairs of --dataset: is the better answer really in "
            "`chosen`?",
        )

    def _chance(self, over: dict[str, float]) -> list[str]:
        right = over.get(self.accuracy, 0.0)
        count = over.get(f"{self.accuracy}#", 0.0)
        low, high = wilson_interval(right, count)
        if count < 200 or not low <= 0.5 <= high:
            return []
        return self._once(
            "chance",
            f"accuracy on the training pairs of the last {PATIENCE} steps is {right / count:.3f} "
            f"({count:.0f} pairs, 95% {low:.3f} to {high:.3f}): chance. Raise --lr, or look for "
            "mislabeled pairs",
        )

    def _falling(self) -> list[str]:
        names = ("lp_chosen", "lp_rejected")
        first = self._looks[0]
        last = self._looks[-1]
        if any(not first.get(f"{name}#") or not last.get(f"{name}#") for name in names):
            return []
        before, now = ([look[name] / look[f"{name}#"] for name in names] for look in (first, last))
        if all(b - n > max(5.0, 0.1 * abs(b)) for b, n in zip(before, now, strict=True)):
            return self._once(
                "falling",
                f"chosen and rejected log-probs both fall ({before[0]:.1f} to {now[0]:.1f} and "
                f"{before[1]:.1f} to {now[1]:.1f}): the likelihood of good responses falls too. "
                "Lower --lr, raise --beta, or add --sft_coef 0.1",
            )
        return []

    def _length(self, over: dict[str, float]) -> list[str]:
        count = over.get("_x#", 0.0)
        if count < 200:
            return []
        found = correlation(count, over["_x"], over["_y"], over["_xx"], over["_yy"], over["_xy"])
        if abs(found) < 0.5:
            return []
        kind = "longer" if found > 0 else "shorter"
        return self._once(
            "length",
            f"rewards correlate with length ({found:.2f} over {count:.0f} responses): {kind} "
            "responses are learned to be better. Compare lengths of chosen and rejected; "
            "--length_normalization or --ld_alpha help with DPO",
        )

    def _once(self, sign: str, text: str) -> list[str]:
        if sign in self._said:
            return []
        self._said.add(sign)
        return [f"warning: {text}"]
