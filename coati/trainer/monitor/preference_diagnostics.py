"""Training diagnostics of preference runs: each finding is reported once, with what to look at."""

import math
from typing import Any

from torch import Tensor

from coati.parallel.objective import Metrics
from coati.utils.distributed import all_gather_object
from coati.utils.meter import MaskedSamples, sum_and_count, to_floats
from coati.utils.statistics import correlation, wilson_interval

EVERY = 10  # optimizer steps between checks
PATIENCE = 50  # optimizer steps before anything is reported
LN2 = math.log(2)


def moments(reward: Tensor, length: Tensor, mask: Tensor | None = None) -> Metrics:
    """The moments from which the correlation of ``reward`` (R,) and ``length`` (R,) over the rows
    of ``mask`` (R,) is computed. Their names begin with "_", so they are not logged."""
    reward = reward.detach().float()
    length = length.float()
    if mask is not None:  # masked rows may be NaN
        reward = reward.masked_fill(~mask, 0.0)
    found: dict[str, Any] = {
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
    """The diagnostics of a run. ``ln2_is_chance``: the loss is ln 2 while chosen and rejected are
    not distinguished. ``accuracy``: the metric that is 1 for a pair ranked correctly."""

    def __init__(self, ln2_is_chance: bool, accuracy: str = "accuracy") -> None:
        self.ln2_is_chance = ln2_is_chance
        self.accuracy = accuracy
        self._sums: dict[str, Any] = {}  # tensors stay on their device between checks
        self._intervals: list[dict[str, float]] = []
        self._reported: set[str] = set()

    def add(
        self, metrics: dict[str, list], loss: float, num_terms: float, is_loss_rank: bool
    ) -> None:
        """Add an optimizer step: this rank's metric samples, and the loss per term and the number
        of terms over all ranks."""
        step: dict[str, Any] = {"_loss": loss * num_terms, "_units": num_terms, "_steps": 1.0}
        if is_loss_rank:
            for name, samples in metrics.items():
                totals = [sum_and_count(values) for values in samples]
                step[name] = sum(total for total, _ in totals)
                step[f"{name}#"] = sum(count for _, count in totals)
        for name, value in step.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def check(self) -> list[str]:
        """New findings, called after each step by every rank. Ranks communicate every
        :data:`EVERY` steps."""
        if self._sums.get("_units") == 0:
            return self._once(
                "zero",
                "nothing in these steps is supervised: each pair has an empty loss mask on a side",
            )
        if self._sums.get("_steps", 0) < EVERY:
            return []
        local = dict(zip(self._sums, to_floats(self._sums.values()), strict=True))
        by_rank = all_gather_object(local)
        total = {
            name: sum(sums.get(name, 0.0) for sums in by_rank) for name in set().union(*by_rank)
        }
        # These are already totals over all ranks.
        total |= {name: local[name] for name in ("_loss", "_units", "_steps")}
        self._intervals.append(total)
        self._sums = {}
        if len(self._intervals) * EVERY < PATIENCE:
            return []
        recent = self._intervals[-PATIENCE // EVERY :]
        sums = {name: sum(interval.get(name, 0.0) for interval in recent) for name in total}
        return [*self._loss(sums), *self._chance(sums), *self._falling(), *self._length(sums)]

    def _loss(self, sums: dict[str, float]) -> list[str]:
        loss = sums["_loss"] / max(sums["_units"], 1)
        if not self.ln2_is_chance or abs(loss - LN2) > 0.01:
            return []
        return self._once(
            "ln2",
            f"the loss is still ln 2 ({loss:.4f}) after {PATIENCE} steps: nothing is being "
            "learned. Raise --lr, and look at pairs of --dataset: is the better response really "
            "in `chosen`?",
        )

    def _chance(self, sums: dict[str, float]) -> list[str]:
        right = sums.get(self.accuracy, 0.0)
        count = sums.get(f"{self.accuracy}#", 0.0)
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
        first = self._intervals[0]
        last = self._intervals[-1]
        if any(not first.get(f"{name}#") or not last.get(f"{name}#") for name in names):
            return []
        before = [first[name] / first[f"{name}#"] for name in names]
        now = [last[name] / last[f"{name}#"] for name in names]
        if all(b - n > max(5.0, 0.1 * abs(b)) for b, n in zip(before, now, strict=True)):
            return self._once(
                "falling",
                f"chosen and rejected log-probs both fall ({before[0]:.1f} to {now[0]:.1f} and "
                f"{before[1]:.1f} to {now[1]:.1f}): the likelihood of good responses falls too. "
                "Lower --lr, raise --beta, or add --sft_coef 0.1",
            )
        return []

    def _length(self, sums: dict[str, float]) -> list[str]:
        count = sums.get("_x#", 0.0)
        if count < 200:
            return []
        r = correlation(count, sums["_x"], sums["_y"], sums["_xx"], sums["_yy"], sums["_xy"])
        if abs(r) < 0.5:
            return []
        kind = "longer" if r > 0 else "shorter"
        return self._once(
            "length",
            f"rewards correlate with length ({r:.2f} over {count:.0f} responses): {kind} "
            "responses are preferred. Compare lengths of chosen and rejected; "
            "--length_normalization or --ld_alpha help with DPO",
        )

    def _once(self, name: str, text: str) -> list[str]:
        if name in self._reported:
            return []
        self._reported.add(name)
        return [f"warning: {text}"]
