"""Importance weights of responses that other weights than the policy's sampled: pure functions.

mu is what sampled a token, pi the policy when the update begins, whose log-probs the clipped ratio
starts from (decoupled PPO, arXiv 2110.00641 and 2505.24298). Each term of the policy's loss is
multiplied by pi / mu, truncated, a constant of the gradient: E_mu[w f] is then E_pi[f] but for what
the cap takes off, which bounds the variance (V-trace, IMPALA, arXiv 1802.01561, eq. 1; for language
models TIS: Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training",
2025, and arXiv 2505.24298).

Shapes: B responses, A actions; ``policy``, ``sampled`` and ``mask`` (B, A); fp32. Masked cells
never count, NaN included.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from coati.models.loss import masked_sum
from coati.models.policy_loss import LARGEST_LOG_RATIO, log_ratio, zero_masked
from coati.models.policy_registry import ROLLOUT_IS, ROLLOUT_IS_CAPS


def importance_ratios(policy: Tensor, sampled: Tensor, mask: Tensor, level: str) -> Tensor:
    """pi / mu at each action, (B, A), 1 where masked: of the token alone, or for ``level``
    "sequence" of the whole response, the product over its actions (Liu et al., "When Speed Kills
    Stability", 2025). A token's ratio has less variance and ignores that its prefix was sampled by
    mu too. Their logarithms are within +-:data:`~coati.models.policy_loss.LARGEST_LOG_RATIO`."""
    logs = log_ratio(policy.detach(), sampled.detach(), mask)
    if level == "sequence":
        whole = (zero_masked(policy.detach(), mask) - zero_masked(sampled.detach(), mask)).sum(1)
        whole = whole.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
        logs = zero_masked(whole[:, None].expand_as(logs), mask)
    return logs.exp()


@dataclass(frozen=True)
class RolloutCorrection:
    """``level``: a name of :data:`~coati.models.policy_registry.ROLLOUT_IS`. ``cap``: of a weight;
    None: that of the level. ``keep``: (low, high), ratios outside of which a weight is 0 (IcePop,
    arXiv 2510.18855); None: all are kept.

    A weight of 0 takes the action out of the policy's loss, not out of what the loss is divided by:
    a step is the smaller, the more of it is left out, and how a global batch is split changes
    nothing.

    Raises:
        ValueError: for another level, a cap below 1, or bounds without 1 between them.
    """

    level: str = "token"
    cap: float | None = None
    keep: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.level not in ROLLOUT_IS:
            raise ValueError(
                f"unknown level of importance weights {self.level!r}; there are "
                f"{', '.join(ROLLOUT_IS)}"
            )
        if self.cap is not None and self.cap < 1:
            raise ValueError(f"importance weights are 1 on average; a cap of {self.cap:g} is below")
        if self.keep is not None and not 0 <= self.keep[0] < 1 < self.keep[1]:
            low, high = self.keep
            raise ValueError(f"ratios from {low:g} to {high:g}: expected 0 <= LOW < 1 < HIGH")

    @property
    def off(self) -> bool:
        """Whether all weights are 1, whatever sampled."""
        return self.level == "none"

    @property
    def largest(self) -> float:
        """The cap that applies."""
        return self.cap if self.cap is not None else ROLLOUT_IS_CAPS[self.level]

    def outside(self, ratios: Tensor) -> Tensor:
        """Where ``ratios`` are not to be trusted; bool, same shape."""
        if self.keep is None:
            return torch.zeros_like(ratios, dtype=torch.bool)
        return (ratios < self.keep[0]) | (ratios > self.keep[1])

    def weights(self, policy: Tensor, sampled: Tensor, mask: Tensor, stale: Tensor) -> Tensor:
        """min(pi / mu, cap) at each action, (B, A), detached: 0 where the ratio is outside of
        ``keep``, exactly 1 in the rows that are not ``stale`` (B,): those sampled by the weights
        that the update begins with, whatever another engine's rounding made of them."""
        if self.off:
            return torch.ones_like(policy, dtype=torch.float32)
        ratios = importance_ratios(policy, sampled, mask, self.level)
        weights = ratios.clamp(max=self.largest).masked_fill(self.outside(ratios), 0.0)
        return torch.where(stale.bool()[:, None], weights, 1.0)

    def sums(self, policy: Tensor, sampled: Tensor, mask: Tensor, stale: Tensor) -> Tensor:
        """What :func:`gap_metrics` wants summed over all ranks, (9,) fp64: number of actions and
        sum of their gaps in the rows that are not ``stale`` (B,), and in those that are; then of
        the stale ones' weights (at level "sequence" one a response, at "none" none) how many there
        are, are truncated and are left out, their sum and that of their squares."""
        mask = mask.bool()
        rows = stale.bool()[:, None]
        gaps = gap_per_action(policy, sampled, mask).double()
        fresh = mask & ~rows
        old = mask & rows
        units = old
        if self.level == "sequence":
            units = old & (old.long().cumsum(1) == 1)
        if self.off:
            units = torch.zeros_like(old)
        ratios = importance_ratios(policy, sampled, mask, self.level)
        weights = self.weights(policy, sampled, mask, stale).double()
        outside = self.outside(ratios)
        found = [fresh.sum(), masked_sum(gaps, fresh), old.sum(), masked_sum(gaps, old)]
        found += [units.sum(), (units & (ratios > self.largest) & ~outside).sum()]
        found += [(units & outside).sum()]
        found += [masked_sum(weights, units), masked_sum(weights.square(), units)]
        return torch.stack([one.double() for one in found])


def gap_per_action(policy: Tensor, sampled: Tensor, mask: Tensor) -> Tensor:
    """|log pi - log mu| of each action, (B, A), 0 where masked."""
    return (zero_masked(policy, mask) - zero_masked(sampled, mask)).abs()


def gap_metrics(sums: Tensor) -> dict[str, float]:
    """From :meth:`RolloutCorrection.sums` of all ranks.

    rollout_gap: mean |log pi - log mu| where both are of the same weights, the engines' difference.
    staleness_gap: the same where the weights have moved since. rollout_is_truncated,
    rollout_is_masked: the shares of weights at the cap and of those left out. rollout_is_ess: the
    effective sample size (sum w)^2 / (n sum w^2) (Kong, "A note on importance sampling using
    standardized weights", 1992), 1 for equal weights; 0 if all are 0.
    """
    fresh, gap, old, stale_gap, units, truncated, masked, weights, squares = sums.tolist()
    metrics = {}
    if fresh:
        metrics["rollout_gap"] = gap / fresh
    if old:
        metrics["staleness_gap"] = stale_gap / old
    if units:
        metrics |= {
            "rollout_is_truncated": truncated / units,
            "rollout_is_masked": masked / units,
            "rollout_is_ess": weights**2 / (units * squares) if squares else 0.0,
        }
    return metrics
