"""Names of the losses a user can choose, with what each needs. Imports nothing heavy: parsers read
these tables.

A new pairwise loss is one function in :mod:`coati.models.pairwise_loss` and one row here.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PairwiseSettings:
    """Hyperparameters the pairwise losses share. ``label_smoothing``: share of pairs taken to be
    labeled the wrong way round."""

    beta: float = 0.1
    gamma: float = 0.0
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class PairwiseLoss:
    """One row of :data:`LOSS_TYPES`.

    ``reference``: log-probs of a reference model are subtracted. ``averaged``: log-probs are means
    over a row's supervised tokens instead of sums. ``takes``: options it has besides beta.
    ``beta``, ``gamma``, ``label_smoothing``: used where the user gives none.
    """

    about: str
    takes: tuple[str, ...] = ()
    reference: bool = True
    averaged: bool = False
    beta: float = 0.1
    gamma: float = 0.0
    label_smoothing: float = 0.0


LOSS_TYPES: dict[str, PairwiseLoss] = {
    "dpo_loss": PairwiseLoss(
        "direct preference optimization (arXiv 2305.18290); with --label_smoothing: conservative "
        "DPO",
        takes=("gamma", "label_smoothing"),
    ),
    "robust": PairwiseLoss(
        "DPO that is unbiased when a share --label_smoothing of the pairs is the wrong way round "
        "(arXiv 2403.00409)",
        takes=("label_smoothing",),
    ),
    "ipo_loss": PairwiseLoss(
        "identity preference optimization (arXiv 2310.12036): a squared distance to 1 / (2 beta)",
        averaged=True,
    ),
    "hinge_loss": PairwiseLoss("a hinge on the same margin (SLiC-HF, arXiv 2305.10425)"),
    "simpo_loss": PairwiseLoss(
        "SimPO (arXiv 2405.14734): average log-probs, a target margin, no reference model",
        takes=("gamma",),
        reference=False,
        averaged=True,
        beta=2.0,
        gamma=1.4,
    ),
    "sigmoid_norm": PairwiseLoss(
        "dpo_loss of average log-probs", takes=("gamma", "label_smoothing"), averaged=True
    ),
    "apo_zero": PairwiseLoss("anchored: chosen up, rejected down (arXiv 2408.06266)"),
    "apo_down": PairwiseLoss("anchored: both down, rejected further (arXiv 2408.06266)"),
    "sppo_hard": PairwiseLoss("self-play: log-ratios to +-1 / (2 beta) (arXiv 2405.00675)"),
    "nca_pair": PairwiseLoss("noise contrastive alignment (arXiv 2402.05369)"),
    "bco_pair": PairwiseLoss("binary classifier of chosen and rejected (arXiv 2404.04656)"),
    "discopop": PairwiseLoss("logistic and exponential loss, blended (arXiv 2406.08414)"),
    "exo_pair": PairwiseLoss(
        "reverse KL to the smoothed preference (arXiv 2402.00856)",
        takes=("label_smoothing",),
        label_smoothing=1e-3,
    ),
}

# --loss_type beside a pairwise loss: mean negative log-prob of the chosen response (MPO, RPO)
SFT = "sft"
# TRL's names
ALIASES = {"sigmoid": "dpo_loss", "ipo": "ipo_loss", "hinge": "hinge_loss"}

# --sft_loss of coati sft and pretrain
SFT_LOSSES = {
    "nll": "-log p of each supervised token",
    "dft": "-p log p, p without gradient: dynamic fine-tuning (arXiv 2508.05629), whose gradient "
    "does not grow as a token gets improbable",
}
NLL = "nll"

# --loss_fn of coati rm
REWARD_LOSSES = ("log_sig", "log_exp")


def full_name(name: str) -> str:
    """The name of :data:`LOSS_TYPES` that ``name``, perhaps one of TRL's, stands for."""
    return ALIASES.get(name, name)


def pairwise_names(loss_type: str | Sequence[str]) -> list[str]:
    """The pairwise losses in ``loss_type``, a name or several, without the SFT term."""
    names = [loss_type] if isinstance(loss_type, str) else loss_type
    return [full_name(name) for name in names if name != SFT]


def needs_reference(loss_type: str | Sequence[str]) -> bool:
    """Whether any of the losses subtracts the log-probs of a reference model."""
    return any(LOSS_TYPES[name].reference for name in pairwise_names(loss_type))
