"""Losses over preference pairs: DPO and its family, and weighted sums of them.

Each loss is a function of a :class:`Pair` and its settings, (B,) out in fp32, registered under its
names of :data:`~coati.models.loss_registry.LOSS_TYPES`. Notation: B pairs; c and r the log-ratios
log pi - log pi_ref of the chosen and the rejected response, d = c - r.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coati.models.loss import check_terms
from coati.models.loss_registry import LOSS_TYPES, SFT, PairwiseSettings, full_name
from coati.utils.logging import get_logger

logger = get_logger(__name__)

DISCOPOP_TAU = 0.05


@dataclass(frozen=True)
class Pair:
    """Log-probs (B,) of the chosen and rejected responses of B pairs, summed over their supervised
    tokens, under the policy and the reference (zeros without one), and how many tokens (B,)."""

    policy_chosen: Tensor
    policy_rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    tokens_chosen: Tensor
    tokens_rejected: Tensor

    @property
    def c(self) -> Tensor:
        """Log-ratio of the chosen response to the reference, (B,) fp32."""
        return (self.policy_chosen - self.ref_chosen).float()

    @property
    def r(self) -> Tensor:
        """Log-ratio of the rejected response to the reference, (B,) fp32."""
        return (self.policy_rejected - self.ref_rejected).float()

    @property
    def d(self) -> Tensor:
        """c - r, (B,) fp32."""
        return self.c - self.r

    def averaged(self) -> "Pair":
        """Means over each response's tokens instead of sums; 0 for a response without tokens."""
        chosen = self.tokens_chosen.clamp(min=1)
        rejected = self.tokens_rejected.clamp(min=1)
        return replace(
            self,
            policy_chosen=self.policy_chosen / chosen,
            policy_rejected=self.policy_rejected / rejected,
            ref_chosen=self.ref_chosen / chosen,
            ref_rejected=self.ref_rejected / rejected,
        )

    def without_reference(self) -> "Pair":
        """The same with a reference of log-prob 0."""
        return replace(
            self,
            ref_chosen=torch.zeros_like(self.policy_chosen),
            ref_rejected=torch.zeros_like(self.policy_rejected),
        )


PairLoss = Callable[[Pair], Tensor]  # a user's own, (B,) losses of B pairs
PairwiseFunction = Callable[[Pair, PairwiseSettings], Tensor]
_FUNCTIONS: dict[str, PairwiseFunction] = {}


def register(*names: str) -> Callable[[PairwiseFunction], PairwiseFunction]:
    """Make a function the loss of ``names``; KeyError for a name without a row in LOSS_TYPES."""

    def add(function: PairwiseFunction) -> PairwiseFunction:
        _FUNCTIONS.update({name: function for name in names if LOSS_TYPES[name]})
        return function

    return add


def pairwise_loss(name: str) -> PairwiseFunction:
    """The function of a name of :data:`~coati.models.loss_registry.LOSS_TYPES`."""
    return _FUNCTIONS[name]


@register("dpo_loss", "simpo_loss", "sigmoid_norm")
def dpo_loss(pair: Pair, settings: PairwiseSettings) -> Tensor:
    """-log sigmoid(beta d - gamma) (arXiv 2305.18290, eq. 7).

    With ``label_smoothing`` e: -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d). Without a
    reference and with average log-probs it is SimPO (arXiv 2405.14734).
    """
    margin = settings.beta * pair.d - settings.gamma
    share = settings.label_smoothing
    if not share:
        return -F.logsigmoid(margin)
    return -(1 - share) * F.logsigmoid(margin) - share * F.logsigmoid(-margin)


@register("robust")
def robust_loss(pair: Pair, settings: PairwiseSettings) -> Tensor:
    """(dpo(d) (1 - e) - dpo(-d) e) / (1 - 2 e), e below 1/2 (arXiv 2403.00409, eq. 12)."""
    margin = settings.beta * pair.d
    share = settings.label_smoothing
    return (-(1 - share) * F.logsigmoid(margin) + share * F.logsigmoid(-margin)) / (1 - 2 * share)


@register("ipo_loss")
def ipo_loss(pair: Pair, settings: PairwiseSettings) -> Tensor:
    """(d - 1 / (2 beta))^2 for d of average log-probs (arXiv 2310.12036, eq. 17)."""
    return (pair.d - 1 / (2 * settings.beta)).square()


@register("hinge_loss")
def hinge_loss(pair: Pair, settings: PairwiseSettings) -> Tensor:
    """max(0, 1 - beta d) (arXiv 2305.10425)."""
    return F.relu(1 - settings.beta * pair.d)


@register("apo_zero")
def apo_zero(pair: Pair, settings: PairwiseSettings) -> Tensor:
    """1 - sigmoid(beta c) + sigmoid(beta r) (arXiv 2408.06266, eq. 7)."""
    return torch.sigmoid(-settings.beta * pair.c) + torch.sigmoid(settings.beta * pair.r)


@register("apo_down")
def apo_down(pair: Pair, settings: PairwiseSettings) -> Tensor:
    """sigmoid(beta c) + 1 - sigmoid(beta (c - r)) (arXiv 2408.06266, eq. 8)."""
    return torch.sigmoid(settings.beta * pair.c) + torch.sigmoid(-settings.beta * pair.d)


@register("sppo_hard")
def sppo_hard(pair: Pair, settings: PairwiseSettings) -> Tensor:
    """(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2 (arXiv 2405.00675)."""
    target = 1 / (2 * settings.beta)
    return (pair.c - target).square() + (pair.r + target).square()


@register("nca_pair")
def nca_pair(pair: Pair, settings: PairwiseSettings) -> Tensor:
    """-ls(beta c) - ls(-beta c) / 2 - ls(-beta r) / 2 with ls = log sigmoid (arXiv 2402.05369)."""
    c = settings.beta * pair.c
    r = settings.beta * pair.r
    return -F.logsigmoid(c) - 0.5 * F.logsigmoid(-c) - 0.5 * F.logsigmoid(-r)


@register("bco_pair")
def bco_pair(pair: Pair, settings: PairwiseSettings) -> Tensor:
    """-log sigmoid(beta c) - log sigmoid(-beta r) (arXiv 2404.04656, without its running mean)."""
    return -F.logsigmoid(settings.beta * pair.c) - F.logsigmoid(-settings.beta * pair.r)


@register("discopop")
def discopop(pair: Pair, settings: PairwiseSettings) -> Tensor:
    """(1 - m) (-log sigmoid(x)) + m exp(-x), x = beta d, m = sigmoid(x / tau) (arXiv 2406.08414,
    eq. 5)."""
    x = settings.beta * pair.d
    blended = torch.sigmoid(-x / DISCOPOP_TAU) * -F.logsigmoid(x)
    # m exp(-x) in one exponent: m vanishes faster than exp(-x) grows.
    return blended + torch.exp(F.logsigmoid(x / DISCOPOP_TAU) - x)


@register("exo_pair")
def exo_pair(pair: Pair, settings: PairwiseSettings) -> Tensor:
    """KL(q || (1 - e, e)) for q = sigmoid(beta d), label smoothing e > 0 (arXiv 2402.00856, eq.
    16)."""
    x = settings.beta * pair.d
    target = x.new_tensor([1 - settings.label_smoothing, settings.label_smoothing]).log()
    chosen = torch.sigmoid(x) * (F.logsigmoid(x) - target[0])
    return chosen + torch.sigmoid(-x) * (F.logsigmoid(-x) - target[1])


# Sums


@dataclass(frozen=True)
class PairwiseTerm:
    """One loss of a sum. ``averaged``: it reads means over tokens. ``reference``: it subtracts the
    reference. ``own``: a user's function instead of the one registered as ``name``."""

    name: str
    weight: float
    settings: PairwiseSettings
    averaged: bool
    reference: bool
    own: PairLoss | None = None

    def view(self, pair: Pair) -> Pair:
        """``pair`` as this loss reads it."""
        pair = pair if self.reference else pair.without_reference()
        return pair.averaged() if self.averaged else pair

    def __call__(self, pair: Pair) -> Tensor:
        """Losses (B,), not weighted. Raises ValueError for a user's function that returns anything
        else."""
        if self.own is None:
            return _FUNCTIONS[self.name](self.view(pair), self.settings)
        return check_terms(self.own(self.view(pair)), pair.policy_chosen.shape, "pair")


@dataclass(frozen=True)
class PairwiseObjective:
    """A weighted sum of pairwise losses, perhaps with the negative log-prob of the chosen response
    (MPO, arXiv 2411.10442: 0.8 dpo_loss + 0.2 bco_pair + 1.0 sft); made by :meth:`of`."""

    terms: tuple[PairwiseTerm, ...]
    sft_coef: float = 0.0

    @classmethod
    def of(
        cls,
        loss_type: str | Sequence[str],
        weights: Sequence[float] | None = None,
        *,
        beta: float | None = None,
        gamma: float | None = None,
        label_smoothing: float = 0.0,
        length_normalization: bool = False,
        sft_coef: float = 0.0,
    ) -> "PairwiseObjective":
        """The objective of one name or several, :data:`LOSS_TYPES`, TRL's or "sft".

        ``weights``: one for each name, default 1. ``beta``, ``gamma``: None is each loss's own
        default. gamma and label smoothing go to the losses that take them.

        Raises ValueError for unknown names, "sft" alone and another number of weights.
        """
        names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
        weights = [1.0] * len(names) if weights is None else list(weights)
        _check_names(names, weights)
        terms = []
        for name, weight in zip(map(full_name, names), weights, strict=True):
            if name == SFT:
                sft_coef += weight
                continue
            row = LOSS_TYPES[name]
            smoothing = label_smoothing if "label_smoothing" in row.takes else 0.0
            if not smoothing and row.label_smoothing:
                smoothing = row.label_smoothing
                logger.info(f"{name}: label smoothing {smoothing:g}, since it needs some")
            settings = PairwiseSettings(
                row.beta if beta is None else beta,
                row.gamma if gamma is None or "gamma" not in row.takes else gamma,
                smoothing,
            )
            averaged = row.averaged or length_normalization
            terms.append(PairwiseTerm(name, weight, settings, averaged, row.reference))
        return cls(tuple(terms), sft_coef)

    @classmethod
    def from_function(
        cls,
        function: PairLoss,
        *,
        beta: float | None = None,
        length_normalization: bool = False,
        sft_coef: float = 0.0,
    ) -> "PairwiseObjective":
        """The objective of a user's ``function`` of a :class:`Pair`, of log-probs that are means
        over tokens with ``length_normalization``. ``beta``: of the logged rewards alone, default
        0.1."""
        settings = PairwiseSettings(LOSS_TYPES["dpo_loss"].beta if beta is None else beta, 0.0, 0.0)
        name = getattr(function, "__name__", type(function).__name__)
        return cls(
            (PairwiseTerm(name, 1.0, settings, length_normalization, True, function),), sft_coef
        )

    @property
    def primary(self) -> PairwiseTerm:
        """The first loss, whose beta and log-ratios the logged rewards are of."""
        return self.terms[0]

    def __call__(self, pair: Pair, chosen_nll: Tensor | None = None) -> Tensor:
        """Losses (B,) of ``pair``; ``chosen_nll`` (B,): mean negative log-prob of the chosen
        response's tokens, read where :attr:`sft_coef` is not 0."""
        losses = torch.stack([term.weight * term(pair) for term in self.terms]).sum(0)
        return losses + self.sft_coef * chosen_nll if self.sft_coef else losses

    def at_reference(self) -> float | None:
        """Loss of a pair whose policy is its reference; None where it says nothing about the two:
        without a reference, with a margin gamma, an SFT term or a user's function."""
        unknown = (t.own is not None or not t.reference or t.settings.gamma for t in self.terms)
        if self.sft_coef or any(unknown):
            return None
        return float(self(Pair(*torch.zeros(6, 1))))


def _check_names(names: Sequence[str], weights: Sequence[float]) -> None:
    if unknown := [name for name in names if full_name(name) not in (*LOSS_TYPES, SFT)]:
        raise ValueError(f"loss_type {unknown[0]!r}: expected one of {', '.join(LOSS_TYPES)}, sft")
    if not any(name != SFT for name in names):
        raise ValueError(f"loss_type {' '.join(names) or '(none)'}: expected a pairwise loss")
    if len(weights) != len(names):
        raise ValueError(
            f"loss_weights: {len(weights)} weights for the {len(names)} losses {' '.join(names)}; "
            "give one for each"
        )


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
        ones = torch.ones_like(chosen)
        pair = Pair(chosen, rejected, ref_chosen, ref_rejected, ones, ones)
        beta = self.settings.beta
        return dpo_loss(pair, self.settings), beta * pair.c.detach(), beta * pair.r.detach()
