"""Policy and value losses of PPO, GRPO and their variants: pure functions, one term per action, no
collectives.

Shapes: B responses, A actions. Position j is the action that produced token j of a response;
``mask`` (B, A) is set on the actions. A masked cell never counts, neither in a value nor in a
gradient, not even when it holds NaN. Log-probs are log_softmax(logits / temperature) at the sampled
token. All numbers are fp32.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coati.models.loss import check_terms, masked_mean, masked_sum
from coati.models.policy_registry import KL_ESTIMATORS, LOSS_AGG_MODES
from coati.utils.meter import MaskedSamples

ReduceSum = Callable[[Tensor], Tensor]  # a tensor -> its sum over the data-parallel ranks

# e^20 is beyond every sensible ratio; without a bound one token makes the gradient infinite, and 0
# times it NaN.
LARGEST_LOG_RATIO = 20.0


def local_sum(sums: Tensor) -> Tensor:
    """The :data:`ReduceSum` of a single process."""
    return sums


def zero_masked(values: Tensor, mask: Tensor) -> Tensor:
    """``values`` in fp32, 0 where ``mask`` is not set; taken before any arithmetic, or NaN comes
    back as a gradient."""
    return values.float().masked_fill(~mask.bool(), 0.0)


# KL estimators: functions of x = log pi(token) - log ref(token)

_KL: dict[str, Callable[[Tensor], Tensor]] = {}


def _kl_estimator(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    _KL[function.__name__] = function
    return function


@_kl_estimator
def k1(x: Tensor) -> Tensor:
    """x, same shape."""
    return x


@_kl_estimator
def k2(x: Tensor) -> Tensor:
    """x^2 / 2, same shape."""
    return x.square() / 2


@_kl_estimator
def k3(x: Tensor) -> Tensor:
    """exp(-x) - 1 + x, same shape, for x bounded below by -:data:`LARGEST_LOG_RATIO`."""
    bounded = x.clamp(min=-LARGEST_LOG_RATIO)
    return torch.expm1(-bounded) + bounded


def kl_per_token(logps: Tensor, reference: Tensor, mask: Tensor, estimator: str = "k1") -> Tensor:
    """Estimated KL(policy || reference) of each action, (B, A), 0 where masked (Schulman,
    "Approximating KL divergence", 2020).

    ``logps``, ``reference``, ``mask``: (B, A). ``estimator``: a name of
    :data:`~coati.models.policy_registry.KL_ESTIMATORS`. Raises ValueError for another.
    """
    if estimator not in _KL:
        raise ValueError(
            f"unknown KL estimator {estimator!r}; there are {', '.join(KL_ESTIMATORS)}"
        )
    return _KL[estimator](zero_masked(logps, mask) - zero_masked(reference, mask))


# Policy


def log_ratio(logps: Tensor, old_logps: Tensor, mask: Tensor) -> Tensor:
    """log(pi / pi_old) of each action, (B, A), within +-:data:`LARGEST_LOG_RATIO`; 0 where
    masked."""
    return (zero_masked(logps, mask) - zero_masked(old_logps, mask)).clamp(
        -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO
    )


def ratio_sums(logps: Tensor, old_logps: Tensor, mask: Tensor) -> Tensor:
    """(2,) fp64: the sum of the ratios of this rank's actions, and their number; what
    :func:`mean_ratio_exceeds` wants summed over all ranks."""
    ratios = log_ratio(logps.detach(), old_logps, mask).exp().double()
    return torch.stack([masked_sum(ratios, mask), mask.sum().double()])


def mean_ratio_exceeds(sums: Tensor, threshold: float) -> Tensor:
    """Whether the mean importance ratio exceeds ``threshold``, a bool scalar: the policy has moved
    so far that a step on these actions would be noise. ``sums``: :func:`ratio_sums` summed over all
    ranks, so that all decide alike."""
    return sums[0] > threshold * sums[1]


def policy_terms(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    skip: Tensor | bool = False,
) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A) of each action (B, A), 0 where masked (arXiv
    1707.06347, eq. 7).

    ``clip_high`` above ``clip_low`` is DAPO's clip-higher (arXiv 2503.14476, eq. 10). ``skip``,
    from :func:`mean_ratio_exceeds`, makes every term 0 and leaves a gradient of zeros, so that a
    backward pass with collectives still runs.
    """
    mask = mask.bool() & ~torch.as_tensor(skip, device=mask.device)
    ratio = log_ratio(logps, old_logps, mask).exp()
    advantages = zero_masked(advantages, mask)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return zero_masked(-torch.minimum(ratio * advantages, clipped * advantages), mask)


@dataclass(frozen=True)
class PolicyTokens:
    """What a user's policy loss gets: (B, A) fp32 numbers of B responses of up to A tokens, 0 where
    ``mask`` is not set. ``old_logps``: those of the policy that sampled."""

    logps: Tensor
    old_logps: Tensor
    advantages: Tensor
    mask: Tensor

    @property
    def log_ratio(self) -> Tensor:
        """log(pi / pi_old), (B, A), within +-:data:`LARGEST_LOG_RATIO`."""
        return log_ratio(self.logps, self.old_logps, self.mask)


PolicyTokenLoss = Callable[[PolicyTokens], Tensor]


def own_policy_terms(
    function: PolicyTokenLoss,
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    skip: Tensor | bool = False,
) -> Tensor:
    """The losses (B, A) of a ``function`` of :class:`PolicyTokens`, 0 where masked; arguments as of
    :func:`policy_terms`.

    Raises ValueError where it returns another shape.
    """
    mask = mask.bool() & ~torch.as_tensor(skip, device=mask.device)
    masked = [zero_masked(each, mask) for each in (logps, old_logps, advantages)]
    tokens = PolicyTokens(masked[0], masked[1], masked[2], mask)
    return zero_masked(check_terms(function(tokens), mask.shape, "token of a response"), mask)


# Value


def value_terms(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float = 0.2
) -> Tensor:
    """.5 max((V - R)^2, (V_old + clip(V - V_old, +-clip) - R)^2) of each action (B, A), 0 where
    masked.

    The clipped form of OpenAI's PPO (baselines/ppo2/model.py): a value that has moved further than
    ``clip`` gains nothing by moving on. All tensors (B, A).
    """
    values = zero_masked(values, mask)
    old_values = zero_masked(old_values, mask)
    returns = zero_masked(returns, mask)
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (near - returns).square())


def value_statistics(
    values: Tensor, old_values: Tensor, mask: Tensor, clip: float = 0.2
) -> dict[str, MaskedSamples]:
    """Samples for the meter, detached: value of each action, and value_clip_fraction, 1 where it
    moved further than ``clip``. All tensors (B, A)."""
    mask = mask.bool()
    values = values.detach().float()
    moved = (values - old_values.float()).abs()
    return {
        "value": MaskedSamples(values, mask),
        "value_clip_fraction": MaskedSamples((moved > clip).float(), mask),
    }


def explained_variance(
    values: Tensor, returns: Tensor, mask: Tensor, reduce_sum: ReduceSum = local_sum
) -> Tensor:
    """1 - Var(R - V) / Var(R) over the actions of all ranks, a scalar: 1 is a perfect critic, 0 one
    that says the mean, below 0 worse than that. 0 where all returns are equal. No mean over
    micro-batches gives it; it is one sample.

    ``reduce_sum``: sums a tensor over all ranks; the identity for one process. Every rank calls it
    twice.
    """
    both = torch.stack(
        [zero_masked(returns, mask), zero_masked(returns, mask) - zero_masked(values, mask)]
    ).double()
    count = mask.sum().double()
    totals = reduce_sum(torch.cat([both.sum((1, 2)), count[None]]))
    means = totals[:2] / totals[2].clamp(min=1)
    squares = reduce_sum(
        masked_sum((both - means[:, None, None]).square(), mask.expand_as(both), (1, 2))
    )
    return torch.where(
        squares[0] > 0, 1 - squares[1] / squares[0].clamp(min=1e-30), torch.zeros_like(squares[0])
    )


# From terms to one number


@dataclass(frozen=True)
class LossAggregation:
    """How (B, A) terms become one number; ``mode``: a name of
    :data:`~coati.models.policy_registry.LOSS_AGG_MODES`.

    The loss of an optimizer step is the sum of :meth:`total` over its micro-batches and ranks
    divided by the sum of :meth:`num_terms`, so how the global batch is split changes nothing.
    ``max_new_tokens``: the divisor of "seq-mean-token-sum-norm".

    Raises:
        ValueError: for another ``mode``, or "seq-mean-token-sum-norm" without ``max_new_tokens``.
    """

    mode: str = "token-mean"
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in LOSS_AGG_MODES:
            raise ValueError(
                f"unknown loss_agg_mode {self.mode!r}; there are {', '.join(LOSS_AGG_MODES)}"
            )
        if self.mode == "seq-mean-token-sum-norm" and not self.max_new_tokens:
            raise ValueError(
                f"loss_agg_mode {self.mode!r} divides by max_new_tokens; give the longest response "
                "allowed"
            )

    def total(self, terms: Tensor, mask: Tensor) -> Tensor:
        """The sum of what is averaged, a scalar; ``terms`` and ``mask`` (B, A)."""
        if self.mode == "token-mean":
            return masked_sum(terms, mask)
        if self.mode == "seq-mean-token-mean":
            return masked_mean(terms, mask, dim=1).sum()
        return masked_sum(terms, mask) / self.max_new_tokens

    def num_terms(self, mask: Tensor) -> Tensor:
        """How many are averaged, a scalar: actions of ``mask`` (B, A), or responses with any."""
        return mask.bool().sum() if self.mode == "token-mean" else mask.bool().any(dim=1).sum()


# Mean over a single batch; the trainers average over the global batch with the functions above


class PolicyLoss(nn.Module):
    """Mean of :func:`policy_terms` over the actions of a batch. ``reduce_sum``: sums a tensor over
    all ranks."""

    def __init__(
        self,
        clip_eps: float = 0.2,
        skip_threshold: float = 20.0,
        reduce_sum: ReduceSum = local_sum,
    ) -> None:
        super().__init__()
        self.clip_eps = clip_eps
        self.skip_threshold = skip_threshold
        self.reduce_sum = reduce_sum

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
    ) -> tuple[Tensor, bool, Tensor]:
        """Loss, whether the batch is skipped, and the largest ratio (0 without actions); all inputs
        (B, A)."""
        mask = (
            torch.ones_like(log_probs, dtype=torch.bool)
            if action_mask is None
            else action_mask.bool()
        )
        skip = mean_ratio_exceeds(
            self.reduce_sum(ratio_sums(log_probs, old_log_probs, mask)), self.skip_threshold
        )
        terms = policy_terms(
            log_probs, old_log_probs, advantages, mask, self.clip_eps, self.clip_eps, skip
        )
        ratios = log_ratio(log_probs.detach(), old_log_probs, mask).exp().masked_fill(~mask, 0.0)
        return masked_mean(terms, mask), bool(skip), ratios.amax()


class ValueLoss(nn.Module):
    """Mean of :func:`value_terms` over the actions of a batch; the return is advantage + old value,
    so advantages are those before whitening."""

    def __init__(self, clip_eps: float = 0.2) -> None:
        super().__init__()
        self.clip_eps = clip_eps

    def forward(
        self,
        values: Tensor,
        old_values: Tensor,
        advantage: Tensor,
        action_mask: Tensor | None = None,
    ) -> Tensor:
        mask = (
            torch.ones_like(values, dtype=torch.bool) if action_mask is None else action_mask.bool()
        )
        return masked_mean(
            value_terms(values, old_values, advantage + old_values, mask, self.clip_eps), mask
        )
