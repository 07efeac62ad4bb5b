"""Surrogate losses of the policy by their names: what is made of the ratio pi / pi_old and the
advantage of each action.

Each is a function of :class:`~coati.models.policy_loss.PolicyTokens` and its settings, (B, A)
losses out, registered under its name of :data:`~coati.models.policy_registry.POLICY_LOSSES`, beside
what the loss clips. Notation: r the ratio of an action, A its advantage, sg stop-gradient. At r = 1
the gradient of each is that of REINFORCE, -A grad log pi.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from coati.models.loss import masked_mean
from coati.models.policy_loss import LARGEST_LOG_RATIO, PolicyTokens, k3, policy_terms
from coati.models.policy_registry import CISPO_CAP, POLICY_LOSSES, SAPO_TAU
from coati.utils.meter import MaskedSamples


@dataclass(frozen=True)
class SurrogateSettings:
    """``name``: of :data:`~coati.models.policy_registry.POLICY_LOSSES`. ``clip_low``,
    ``clip_high``: of the ratio, below and above 1. ``dual_clip``: c of the dual clip; None: none.
    ``cispo_cap``: largest weight. ``sapo_tau``: of actions of positive advantage, and of others.

    Raises:
        ValueError: for another name.
    """

    name: str = "ppo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    cispo_cap: float = CISPO_CAP
    sapo_tau: tuple[float, float] = SAPO_TAU

    def __post_init__(self) -> None:
        if self.name not in POLICY_LOSSES:
            raise ValueError(
                f"unknown policy loss {self.name!r}; there are {', '.join(POLICY_LOSSES)}"
            )


SurrogateFunction = Callable[[PolicyTokens, SurrogateSettings], Tensor]
_LOSSES: dict[str, SurrogateFunction] = {}
_CLIPPED: dict[str, SurrogateFunction] = {}


def register(name: str, clipped: SurrogateFunction) -> Callable:
    """Make a function the loss of ``name``; ``clipped``: (B, A) bool, the actions whose gradient it
    clips. KeyError for a name without a row in POLICY_LOSSES."""

    def add(function: SurrogateFunction) -> SurrogateFunction:
        POLICY_LOSSES[name]
        _LOSSES[name] = function
        _CLIPPED[name] = clipped
        return function

    return add


def surrogate_terms(tokens: PolicyTokens, settings: SurrogateSettings) -> Tensor:
    """The losses (B, A) of the actions, fp32, anything where masked."""
    return _LOSSES[settings.name](tokens, settings)


def sequence_log_ratio(tokens: PolicyTokens) -> Tensor:
    """(B, 1): the mean of log(pi / pi_old) over a response's actions; 0 without any. Its
    exponential is GSPO's s, the ratio of the responses' likelihoods, normalized by length (arXiv
    2507.18071, eq. 7)."""
    whole = masked_mean(tokens.logps - tokens.old_logps, tokens.mask, dim=1)
    return whole.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)[:, None]


def _clips(ratio: Tensor, tokens: PolicyTokens, settings: SurrogateSettings) -> Tensor:
    above = (tokens.advantages > 0) & (ratio > 1 + settings.clip_high)
    below = (tokens.advantages < 0) & (ratio < 1 - settings.clip_low)
    return above | below


def _clipped_loss(ratio: Tensor, tokens: PolicyTokens, settings: SurrogateSettings) -> Tensor:
    clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    return -torch.minimum(ratio * tokens.advantages, clipped * tokens.advantages)


def _ppo_clips(tokens: PolicyTokens, settings: SurrogateSettings) -> Tensor:
    ratio = tokens.log_ratio.exp()
    clips = _clips(ratio, tokens, settings)
    if settings.dual_clip is not None:
        clips |= (tokens.advantages < 0) & (ratio > settings.dual_clip)
    return clips


@register("ppo", _ppo_clips)
def ppo(tokens: PolicyTokens, settings: SurrogateSettings) -> Tensor:
    """-min(r A, clip(r) A); with ``dual_clip`` c, of a negative A at most -c A, however far r has
    grown (arXiv 1912.09729)."""
    clip = (settings.clip_low, settings.clip_high)
    losses = policy_terms(tokens.logps, tokens.old_logps, tokens.advantages, tokens.mask, *clip)
    if settings.dual_clip is None:
        return losses
    bounded = torch.minimum(losses, -settings.dual_clip * tokens.advantages)
    return torch.where(tokens.advantages < 0, bounded, losses)


def _gspo_clips(tokens: PolicyTokens, settings: SurrogateSettings) -> Tensor:
    return _clips(sequence_log_ratio(tokens).exp(), tokens, settings)


@register("gspo", _gspo_clips)
def gspo(tokens: PolicyTokens, settings: SurrogateSettings) -> Tensor:
    """-min(s A, clip(s) A) at each action, s of the whole response (arXiv 2507.18071, eq. 5): with
    one advantage a response one value a response, which the mean over its actions leaves as it
    is."""
    return _clipped_loss(sequence_log_ratio(tokens).exp(), tokens, settings)


@register("gspo-token", _gspo_clips)
def gspo_token(tokens: PolicyTokens, settings: SurrogateSettings) -> Tensor:
    """GSPO with s_t = sg(s) pi / sg(pi): the values of GSPO, the gradient of each action by its own
    advantage (arXiv 2507.18071, eq. 13 and 14)."""
    moved = sequence_log_ratio(tokens).detach() + tokens.logps - tokens.logps.detach()
    return _clipped_loss(moved.exp(), tokens, settings)


def _cispo_clips(tokens: PolicyTokens, settings: SurrogateSettings) -> Tensor:
    return tokens.log_ratio.exp() > settings.cispo_cap


@register("cispo", _cispo_clips)
def cispo(tokens: PolicyTokens, settings: SurrogateSettings) -> Tensor:
    """-sg(min(r, cap)) A log pi (arXiv 2506.13585, eq. 4 and 5, without a lower bound)."""
    weight = tokens.log_ratio.exp().clamp(max=settings.cispo_cap).detach()
    return -weight * tokens.advantages * tokens.logps


def _temperatures(tokens: PolicyTokens, settings: SurrogateSettings) -> Tensor:
    positive, other = settings.sapo_tau
    return torch.full_like(tokens.logps, other).masked_fill(tokens.advantages > 0, positive)


def _sapo_closes(tokens: PolicyTokens, settings: SurrogateSettings) -> Tensor:
    gate = torch.sigmoid(_temperatures(tokens, settings) * (tokens.log_ratio.exp() - 1))
    return 4 * gate * (1 - gate) < 0.5


@register("sapo", _sapo_closes)
def sapo(tokens: PolicyTokens, settings: SurrogateSettings) -> Tensor:
    """-(4 / tau) sigmoid(tau (r - 1)) A (arXiv 2511.20347): the gradient's weight is 1 at
    r = 1 and falls off on both sides. What counts as clipped has less than half of it."""
    tau = _temperatures(tokens, settings)
    return -(4 / tau) * torch.sigmoid(tau * (tokens.log_ratio.exp() - 1)) * tokens.advantages


def surrogate_statistics(
    tokens: PolicyTokens, settings: SurrogateSettings
) -> dict[str, MaskedSamples]:
    """Samples for the meter, detached.

    clip_fraction: 1 for each action whose gradient the loss clips, else 0. update_kl: k3 of old
    against new policy per action, how far this phase's updates have gone. sampled_entropy: -log
    pi_old per action, whose mean is an unbiased estimate of the sampling entropy. ratio_max: the
    largest ratio of an action, one number, none without actions.
    """
    tokens = PolicyTokens(
        tokens.logps.detach(), tokens.old_logps, tokens.advantages, tokens.mask.bool()
    )
    mask = tokens.mask
    moved = tokens.log_ratio
    ratio = moved.exp()
    return {
        "clip_fraction": MaskedSamples(_CLIPPED[settings.name](tokens, settings).float(), mask),
        "update_kl": MaskedSamples(k3(-moved), mask),
        "sampled_entropy": MaskedSamples(-tokens.old_logps.float(), mask),
        "ratio_max": MaskedSamples(ratio.masked_fill(~mask, 0.0).amax()[None], mask.any()[None]),
    }
