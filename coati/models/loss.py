"""Losses as pure functions of tensors: one value per example or token out, the caller reduces.

Shapes: B pairs or rows, S sequence. A log-prob of a row is a sum (or a mean) over its supervised
tokens. Everything is computed in fp32, whatever comes in.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coati.models.logprobs import IGNORE_INDEX, logprobs_from_logits
from coati.models.loss_registry import LOSS_TYPES, REWARD_LOSSES

# Nearer to probability 1 the odds of an fp32 log-prob are rounding noise, and their gradient is not
# finite.
LARGEST_LOGP = -1e-7


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
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


# Reward model


def log_sig_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """-log sigmoid(chosen - rejected - margin) for scores (B,); ``margin``: how much better chosen
    is to be."""
    return -F.logsigmoid(chosen.float() - rejected.float() - margin)


def log_exp_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """log(1 + exp(rejected - chosen + margin)): the same number as :func:`log_sig_loss`, and stable
    too."""
    return F.softplus(rejected.float() - chosen.float() + margin)


def reward_loss(name: str) -> Callable[..., Tensor]:
    """The function behind a name of :data:`~coati.models.loss_registry.REWARD_LOSSES`."""
    return globals()[REWARD_LOSSES[name]]


def centering(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(chosen + rejected)^2, (B,): keeps the mean score of a pair at zero (arXiv 2312.09244)."""
    return (chosen.float() + rejected.float()).square()


# Pairs of log-probs


@dataclass(frozen=True)
class PairwiseSettings:
    """What the pairwise losses share. ``label_smoothing``: the share of pairs taken to be the wrong
    way round."""

    beta: float = 0.1
    gamma: float = 0.0
    label_smoothing: float = 0.0


def dpo_loss(difference: Tensor, settings: PairwiseSettings) -> Tensor:
    """-log sigmoid(beta d - gamma) (arXiv 2305.18290, eq. 7), (B,) -> (B,).

    ``difference``: d = (log pi(chosen) - log pi(rejected)) minus the same of the reference. With
    ``label_smoothing`` e: -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d). Without a
    reference and with average log-probs it is SimPO.
    """
    margin, share = settings.beta * difference.float() - settings.gamma, settings.label_smoothing
    if not share:
        return -F.logsigmoid(margin)
    return -(1 - share) * F.logsigmoid(margin) - share * F.logsigmoid(-margin)


def robust_loss(difference: Tensor, settings: PairwiseSettings) -> Tensor:
    """(dpo(d) (1 - e) - dpo(-d) e) / (1 - 2 e) (arXiv 2403.00409, eq. 12)."""
    margin, share = settings.beta * difference.float(), settings.label_smoothing
    return (-(1 - share) * F.logsigmoid(margin) + share * F.logsigmoid(-margin)) / (1 - 2 * share)


def ipo_loss(difference: Tensor, settings: PairwiseSettings) -> Tensor:
    """(d - 1 / (2 beta))^2 for d of average log-probs (arXiv 2310.12036, eq. 17)."""
    return (difference.float() - 1 / (2 * settings.beta)).square()


def hinge_loss(difference: Tensor, settings: PairwiseSettings) -> Tensor:
    """max(0, 1 - beta d) (arXiv 2305.10425)."""
    return F.relu(1 - settings.beta * difference.float())


def pairwise_loss(name: str) -> Callable[[Tensor, PairwiseSettings], Tensor]:
    """The function behind a name of :data:`~coati.models.loss_registry.LOSS_TYPES`."""
    return globals()[LOSS_TYPES[name].function]


def length_desensitized(logps: Tensor, mask: Tensor, alpha: float) -> Tensor:
    """Log-probs of interleaved pairs in which the longer answer's surplus counts ``alpha`` (LD-DPO,
    arXiv 2409.06411).

    ``logps``, ``mask`` (2B, S), rows 2i and 2i + 1 a pair -> (2B,). Tokens up to the length of the
    shorter answer count fully.
    """
    mask = mask.bool()
    shorter = mask.sum(1).view(-1, 2).amin(1).repeat_interleave(2)
    public = mask & (mask.cumsum(1) <= shorter[:, None])
    return masked_sum(logps, public, 1) + alpha * masked_sum(logps, mask & ~public, 1)


class DpoLoss(nn.Module):
    """DPO (or, with averages and no reference, SimPO) of four (B,) log-probs."""

    def __init__(self, beta: float = 0.1, gamma: float = 0.0) -> None:
        super().__init__()
        self.settings = PairwiseSettings(beta, gamma)

    def forward(
        self,
        chosen: Tensor,
        rejected: Tensor,
        ref_chosen: Tensor | None = None,
        ref_rejected: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses (B,), and the detached rewards beta (log pi - log reference) of chosen and
        rejected.

        Raises ValueError when the four are not of one shape (B,).
        """
        ref_chosen = torch.zeros_like(chosen) if ref_chosen is None else ref_chosen
        ref_rejected = torch.zeros_like(rejected) if ref_rejected is None else ref_rejected
        shapes = {tuple(t.shape) for t in (chosen, rejected, ref_chosen, ref_rejected)}
        if len(shapes) > 1 or chosen.dim() != 1:
            raise ValueError(
                "expected four tensors of one shape (B,), one log-prob per row; got "
                f"{sorted(shapes)}"
            )
        losses = dpo_loss((chosen - rejected) - (ref_chosen - ref_rejected), self.settings)
        beta = self.settings.beta
        return (
            losses,
            beta * (chosen - ref_chosen).detach(),
            beta * (rejected - ref_rejected).detach(),
        )


class LogSigLoss(nn.Module):
    """Mean of :func:`log_sig_loss`."""

    def forward(self, chosen_reward: Tensor, reject_reward: Tensor) -> Tensor:
        return log_sig_loss(chosen_reward, reject_reward).mean()


class LogExpLoss(nn.Module):
    """Mean of :func:`log_exp_loss`."""

    def forward(self, chosen_reward: Tensor, reject_reward: Tensor) -> Tensor:
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
