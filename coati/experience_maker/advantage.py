"""From scores to advantages: per-token rewards, generalized advantage estimation, whitening,
group-relative advantages.

Pure functions of tensors. Shapes: B responses, A actions; a response starts in column 0 and
``mask`` (B, A) is set on its actions; tokens of others may stand between them. Masked cells are
ignored, NaN included, and are 0 in results.
What is taken over all ranks gets its collective as ``reduce_sum``
(:data:`~coati.models.policy_loss.ReduceSum`; by default a single process's). Everything is fp32,
sums over many actions fp64.
"""

import torch
from torch import Tensor

from coati.experience_maker.advantage_registry import GROUP_METHODS, REWARD_PLACES
from coati.models.loss import masked_sum
from coati.models.policy_loss import ReduceSum, local_sum, zero_masked

GROUP_EPSILON = 1e-4  # added to a group's standard deviation (arXiv 2402.03300)
WHITEN_EPSILON = 1e-8  # added to the variance of all actions


# Scores of responses, (B,)


def penalize_missing_eos(scores: Tensor, stopped: Tensor, penalty: float) -> Tensor:
    """``scores`` (B,) less ``penalty`` where a response did not end by itself (``stopped`` (B,) is
    False)."""
    return scores.float() - penalty * (~stopped.bool()).float()


def overlong_penalty(lengths: Tensor, max_length: int, buffer_len: int) -> Tensor:
    """DAPO's soft overlong punishment, (B,), to be added to the scores (arXiv 2503.14476, eq. 13).

    ``lengths`` (B,) in tokens. 0 up to ``max_length - buffer_len`` tokens, then falling by
    1 / buffer_len a token, -1 above ``max_length``. Raises ValueError for a ``buffer_len`` that is
    not in 1 to ``max_length``.
    """
    if not 0 < buffer_len <= max_length:
        raise ValueError(
            f"overlong_buffer_len must be between 1 and {max_length} tokens, not {buffer_len}"
        )
    return ((max_length - buffer_len - lengths.float()) / buffer_len).clamp(-1.0, 0.0)


def kl_of_responses(kl: Tensor, mask: Tensor) -> Tensor:
    """(B,): the sum of a response's ``kl`` (B, A) over its actions; what a KL target and the logged
    KL mean."""
    return masked_sum(kl.float(), mask, 1)


def scores_less_kl(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Scores (B,) less ``kl_coef`` times a response's KL: KL as part of the reward where there is
    no critic."""
    return scores.float() - kl_coef * kl_of_responses(kl, mask)


# Rewards of actions, (B, A)


def token_rewards(
    kl: Tensor,
    scores: Tensor,
    mask: Tensor,
    kl_coef: float,
    clip: float | None = 5.0,
    at: str = "last",
) -> Tensor:
    """r_t = -kl_coef kl_t, plus the score within +-``clip`` (None: as it is) at the last action of
    the response.

    ``kl`` (B, A) as :func:`kl_per_token` gives it, ``scores`` (B,). ``at`` "every_token" adds the
    score to every action. A response without actions has no reward. Raises ValueError for another
    ``at``.

    Of responses of older weights the KL is as it is, without an importance weight of its own: it is
    part of the reward, whose whole term in the policy's loss is weighted
    (:mod:`~coati.models.rollout_correction`); verl and OpenRLHF do the same. What is logged, and
    what a KL target compares with, are weighted, since they estimate the policy's KL.
    """
    if at not in REWARD_PLACES:
        raise ValueError(
            f"unknown place of the reward {at!r}; there are {', '.join(REWARD_PLACES)}"
        )
    mask = mask.bool()
    scores = scores.float() if clip is None else scores.float().clamp(-clip, clip)
    place = mask if at == "every_token" else last_action(mask)
    return torch.where(place, scores[:, None], 0.0) - kl_coef * zero_masked(kl, mask)


def last_action(mask: Tensor) -> Tensor:
    """(B, A) bool, set on the last action of each response that has any."""
    mask = mask.bool()
    after = mask.flip(1).long().cumsum(1).flip(1)  # actions from here on, this one included
    return mask & (after == 1)


def broadcast_to_tokens(advantages: Tensor, mask: Tensor) -> Tensor:
    """One number per response (B,) at each of its actions, (B, A)."""
    return torch.where(mask.bool(), advantages.float()[:, None], 0.0)


def rewards_to_go(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """R_t = r_t + gamma R_(t+1), (B, A): the return of each action, the advantage where there is no
    baseline."""
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)[0]


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, both (B, A) (arXiv 1506.02438, eq. 16).

    ``values`` (B, A): V_t of the state before action t. After the last action there is nothing: its
    V and A are 0. Where ``mask`` has holes (tokens that others wrote between two turns) the action
    after a hole follows the one before it: a hole takes no step of time. Returns are advantages +
    values, before any whitening.
    """
    rewards = zero_masked(rewards, mask)
    values = zero_masked(values, mask)
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0]) if rewards.shape[1] else None
    for t in reversed(range(rewards.shape[1])):
        # delta_t = r_t + gamma V_(t+1) - V_t;  A_t = delta_t + gamma lambda A_(t+1)
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        acts = mask[:, t].bool()
        next_advantage = torch.where(acts, delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(acts, values[:, t], next_value)
        advantages[:, t] = next_advantage
    advantages = zero_masked(advantages, mask)
    return advantages, advantages + values


def whiten(advantages: Tensor, mask: Tensor, reduce_sum: ReduceSum = local_sum) -> Tensor:
    """(A - mean) rsqrt(var + 1e-8) over the actions of all ranks, var unbiased, (B, A); 0 where
    masked.

    A single action has no variance; its result is 0. Every rank calls ``reduce_sum`` twice.
    """
    mask, values = mask.bool(), zero_masked(advantages, mask).double()
    total, count = reduce_sum(torch.stack([values.sum(), mask.sum().double()]))
    centered = zero_masked(advantages, mask).double() - total / count.clamp(min=1)
    squares = reduce_sum(masked_sum(centered.square(), mask))
    variance = squares / (count - 1).clamp(min=1)
    return zero_masked(centered * torch.rsqrt(variance + WHITEN_EPSILON), mask)


# Groups: rows g G to (g + 1) G - 1 answer the same prompt


def _groups(scores: Tensor, group_size: int) -> Tensor:
    """(B,) -> (groups, G) fp64; raises ValueError when rows are left over."""
    if group_size < 1 or len(scores) % group_size:
        raise ValueError(
            f"{len(scores)} responses are not a whole number of groups of {group_size}"
        )
    # Sums of fp32 numbers are exact in fp64: equal scores are exactly their mean, and no small std
    # magnifies rounding.
    return scores.float().double().view(-1, group_size)


def group_advantages(scores: Tensor, group_size: int, method: str = "grpo") -> Tensor:
    """One advantage per response, (B,), from ``scores`` (B,) whose groups lie together.

    ``method``: a name of :data:`~coati.experience_maker.advantage_registry.GROUP_METHODS`;
    whitening, where it says so, is left to :func:`whiten`. Equal scores give exactly 0. Raises
    ValueError for another name, rows left over, or groups of one in a method that compares.
    """
    if method not in GROUP_METHODS:
        raise ValueError(
            f"unknown group advantage {method!r}; there are {', '.join(GROUP_METHODS)}"
        )
    if not GROUP_METHODS[method].group:
        return scores.float()
    if group_size == 1:
        raise ValueError(
            f"{method} compares the responses to one prompt and got one of each (--num_generations "
            "1): every advantage would be 0; use 2 or more, or reinforce_pp"
        )
    groups = _groups(scores, group_size)
    return _SCALES[method](groups - groups.mean(1, keepdim=True), group_size).flatten().float()


def _by_deviation(centered: Tensor, group_size: int) -> Tensor:
    deviation = (centered.square().sum(1, keepdim=True) / (group_size - 1)).sqrt()
    return centered / (deviation + GROUP_EPSILON)


def _by_nothing(centered: Tensor, group_size: int) -> Tensor:
    return centered


def _leave_one_out(centered: Tensor, group_size: int) -> Tensor:
    return centered * group_size / (group_size - 1)  # r - mean of the others


_SCALES = {
    "grpo": _by_deviation,
    "dapo": _by_deviation,
    "dr_grpo": _by_nothing,
    "reinforce_pp_baseline": _by_nothing,
    "rloo": _leave_one_out,
}


def _equal(groups: Tensor) -> Tensor:
    return (groups == groups[:, :1]).all(1)


def equal_groups(scores: Tensor, group_size: int) -> Tensor:
    """(B,) bool: the response is in a group whose scores are all equal, from which nothing can be
    learned."""
    return _equal(_groups(scores, group_size)).repeat_interleave(group_size)


def drop_rows(mask: Tensor, dropped: Tensor) -> tuple[Tensor, int]:
    """``mask`` (B, A) without the actions of the ``dropped`` (B,) rows, and how many rows that are.

    Masked instead of removed: every rank keeps as many micro-batches as the others, and a mean
    divides by what is left.
    """
    return mask.bool() & ~dropped.bool()[:, None], int(dropped.sum())
