"""Losses as pure functions of tensors: one value per example or token out, the caller reduces.

Shapes: B pairs or rows, S sequence. A log-prob of a row is a sum (or a mean) over its supervised
tokens. Everything is computed in fp32, whatever comes in.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coati.models.logprobs import logprobs_from_logits
from coati.utils.constants import IGNORE_INDEX

# Nearer to probability 1 the odds of an fp32 log-prob are rounding noise, and their gradient is not
# finite.
LARGEST_LOGP = -1e-7


def masked_sum(values: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Sum of ``values`` where ``mask`` (same shape, bool or 0/1) is set; a masked value never
    counts, not even NaN."""
    kept = values.masked_fill(~mask.bool(), 0)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of ``values`` where ``mask`` (same shape, bool or 0/1) is set, over ``dim`` or
    everything.

    A masked value never counts, not even NaN; the mean of nothing is 0.
    """
    mask = mask.bool()
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1)


def check_terms(losses: Any, shape: torch.Size, what: str) -> Tensor:
    """``losses`` of a user's loss function, in fp32.

    Raises ValueError where it is no tensor of ``shape``, one number for each ``what``: the caller
    divides their sum by the number in the global batch, which a mean would count twice.
    """
    if isinstance(losses, Tensor) and losses.shape == shape:
        return losses.float()
    found = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
    raise ValueError(
        f"the loss function returned {found}; expected a tensor of shape {tuple(shape)}, one loss "
        f"for each {what}, without a sum or a mean: the trainer averages over the global batch"
    )


class GPTLMLoss(nn.Module):
    """Mean negative log-probability of the labeled tokens, from full logits.

    The trainers do not use it: they sum log-probs that :class:`~coati.models.head.Head` gives
    without full logits.
    """

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """``logits`` (B, S, V), ``labels`` (B, S); position t predicts ``labels[:, t + 1]``, -100
        is left out.

        A scalar in fp32; 0, not NaN, where nothing is labeled.
        """
        logps = logprobs_from_logits(logits, labels, IGNORE_INDEX)
        return masked_mean(-logps, torch.ones_like(logps))


# Supervised fine-tuning


def dynamic_finetuning_loss(logps: Tensor) -> Tensor:
    """-sg(p) log p of tokens (n,) (DFT, arXiv 2508.05629, eq. 9); sg: without gradient."""
    logps = logps.float()
    return -logps.detach().exp() * logps


# Reward model


def log_sig_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """-log sigmoid(chosen - rejected - margin) for scores (B,) (arXiv 2203.02155, eq. 1);
    ``margin``: how much better chosen is to be."""
    return -F.logsigmoid(chosen.float() - rejected.float() - margin)


def log_exp_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """log(1 + exp(rejected - chosen + margin)): the same number as :func:`log_sig_loss` (arXiv
    2203.02155, eq. 1), and stable too."""
    return F.softplus(rejected.float() - chosen.float() + margin)


def reward_loss(name: str) -> Callable[..., Tensor]:
    """The function of a name of :data:`~coati.models.loss_registry.REWARD_LOSSES`."""
    return {"log_sig": log_sig_loss, "log_exp": log_exp_loss}[name]


def centering(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(chosen + rejected)^2, (B,): keeps the mean score of a pair at zero (arXiv 2312.09244)."""
    return (chosen.float() + rejected.float()).square()


# Pairs


def length_desensitized(logps: Tensor, mask: Tensor, alpha: float) -> Tensor:
    """Log-probs of interleaved pairs in which the longer response's surplus counts ``alpha``
    (LD-DPO, arXiv 2409.06411).

    ``logps``, ``mask`` (2B, S), rows 2i and 2i + 1 a pair -> (2B,). Tokens up to the length of the
    shorter response count fully.
    """
    mask = mask.bool()
    shorter = mask.sum(1).view(-1, 2).amin(1).repeat_interleave(2)
    public = mask & (mask.cumsum(1) <= shorter[:, None])
    return masked_sum(logps, public, 1) + alpha * masked_sum(logps, mask & ~public, 1)


class LogSigLoss(nn.Module):
    """Mean of :func:`log_sig_loss`."""

    def forward(self, chosen_reward: Tensor, reject_reward: Tensor) -> Tensor:
        """Scores (B,), (B,) -> a scalar."""
        return log_sig_loss(chosen_reward, reject_reward).mean()


class LogExpLoss(nn.Module):
    """Mean of :func:`log_exp_loss`."""

    def forward(self, chosen_reward: Tensor, reject_reward: Tensor) -> Tensor:
        """Scores (B,), (B,) -> a scalar."""
        return log_exp_loss(chosen_reward, reject_reward).mean()


# ORPO


def log_odds(logps: Tensor) -> Tensor:
    """log(p / (1 - p)) for each log p <= 0, same shape, without leaving log space."""
    logps = logps.float().clamp(max=LARGEST_LOGP)
    return logps - torch.log(-torch.expm1(logps))


def odds_ratio_loss(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """-log sigmoid of the log odds ratio of average log-probs (B,) (arXiv 2403.07691, eq. 7), and
    that ratio."""
    ratio = log_odds(chosen) - log_odds(rejected)
    return -F.logsigmoid(ratio), ratio


# KTO


def kto_loss(
    advantage: Tensor,
    label: Tensor,
    baseline: Tensor | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Kahneman-Tversky loss of rows (B,) (arXiv 2402.01306, eq. 8).

    ``advantage``: h = log pi - log reference of a row; ``label`` (B,) bool: desirable or not;
    ``baseline``: z of :func:`kto_baseline`, a constant. w_d (1 - sigmoid(beta (h - z))) or w_u (1 -
    sigmoid(beta (z - h))).
    """
    toward = beta * (advantage.float() - baseline)
    desirable = desirable_weight * torch.sigmoid(-toward)  # 1 - sigmoid(x) = sigmoid(-x)
    undesirable = undesirable_weight * torch.sigmoid(toward)
    return torch.where(label.bool(), desirable, undesirable)


def kto_baseline(total: float, rows: float) -> float:
    """z: the mean of (log pi - log reference) over ``rows`` mismatched rows, at least 0; 0 without
    rows."""
    return max(total / rows, 0.0) if rows else 0.0


def balance(
    desirable: int, undesirable: int, desirable_weight: float, undesirable_weight: float
) -> float:
    """The ratio (w_d n_d) / (w_u n_u), which should be in [1, 4/3] (arXiv 2402.01306, section
    4.2)."""
    return desirable_weight * desirable / (undesirable_weight * undesirable)
