"""The losses over pairs that a user can name, and what each needs. Imports nothing heavy: parsers
read these tables.

A new pairwise loss is one function in :mod:`coati.models.loss` and one entry here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class PairwiseLoss:
    """One row of the table.

    ``function``: its name in :mod:`coati.models.loss`. ``reference``: whether log-probs of a
    reference model are subtracted. ``averaged``: log-probs are means over a row's supervised tokens
    instead of sums. ``takes``: the options besides beta. ``at_reference``: beta -> the loss of a
    pair whose policy is the reference, None where that says nothing.
    """

    function: str
    about: str
    reference: bool = True
    averaged: bool = False
    beta: float = 0.1
    gamma: float = 0.0
    takes: tuple[str, ...] = ()
    at_reference: Callable[[float], float] | None = None


def _ln2(beta: float) -> float:
    return math.log(2)


LOSS_TYPES: dict[str, PairwiseLoss] = {
    "dpo_loss": PairwiseLoss(
        "dpo_loss",
        "direct preference optimization (arXiv 2305.18290); with --label_smoothing: conservative "
        "DPO",
        takes=("gamma", "label_smoothing"),
        at_reference=_ln2,
    ),
    "robust": PairwiseLoss(
        "robust_loss",
        "DPO that is unbiased when a share --label_smoothing of the pairs is the wrong way round "
        "(arXiv 2403.00409)",
        takes=("label_smoothing",),
        at_reference=_ln2,
    ),
    "ipo_loss": PairwiseLoss(
        "ipo_loss",
        "identity preference optimization (arXiv 2310.12036): a squared distance to 1 / (2 beta)",
        averaged=True,
        at_reference=lambda beta: 1 / (4 * beta**2),
    ),
    "hinge_loss": PairwiseLoss(
        "hinge_loss",
        "a hinge on the same margin (SLiC-HF, arXiv 2305.10425)",
        at_reference=lambda beta: 1.0,
    ),
    "simpo_loss": PairwiseLoss(
        "dpo_loss",
        "SimPO (arXiv 2405.14734): average log-probs, a target margin, no reference model",
        reference=False,
        averaged=True,
        beta=2.0,
        gamma=1.4,
        takes=("gamma",),
    ),
}

# --loss_fn of train_rm.py -> function in coati.models.loss
REWARD_LOSSES = {"log_sig": "log_sig_loss", "log_exp": "log_exp_loss"}
