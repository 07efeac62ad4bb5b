"""Mean and spread over all ranks: of one batch of numbers, and of all scores so far."""

import torch
from torch import Tensor

from coati.models.policy_loss import ReduceSum, local_sum


def count_mean_squares(values: Tensor, reduce_sum: ReduceSum) -> tuple[float, float, float]:
    """Count, mean and sum of squared distances from the mean of ``values`` (n,) of all ranks, fp64.
    Every rank calls ``reduce_sum`` twice."""
    values = values.double()
    sums = torch.stack([torch.ones_like(values).sum(), values.sum()])
    count, total = reduce_sum(sums).tolist()
    mean = total / max(count, 1)
    return count, mean, float(reduce_sum((values - mean).square().sum()))


class RunningNormalization:
    """Scores standardized by the running mean and deviation of all scores so far, on all ranks."""

    def __init__(self) -> None:
        self.count = 0.0
        self.mean = 0.0
        self.squares = 0.0  # sum of squared distances from the mean

    @property
    def std(self) -> float:
        """Unbiased; 1 while there is no spread to divide by."""
        variance = self.squares / (self.count - 1) if self.count > 1 else 0.0
        return variance**0.5 if variance > 0 else 1.0

    def update(self, scores: Tensor, reduce_sum: ReduceSum = local_sum) -> None:
        """Take in ``scores`` (B,). Every rank calls ``reduce_sum`` twice.

        The old and the new scores are joined as in Chan, Golub and LeVeque (1983): sums of large
        numbers are never subtracted.
        """
        count, mean, squares = count_mean_squares(scores.detach(), reduce_sum)
        if count == 0:
            return
        joined = self.count + count
        distance = mean - self.mean
        self.squares += squares + distance**2 * self.count * count / joined
        self.mean += distance * count / joined
        self.count = joined

    def __call__(self, scores: Tensor) -> Tensor:
        """(scores - mean) / std, (B,) fp32."""
        return ((scores.double() - self.mean) / self.std).float()

    def state_dict(self) -> dict[str, float]:
        """As JSON keeps it exactly."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.count = float(state["count"])
        self.mean = float(state["mean"])
        self.squares = float(state["squares"])
