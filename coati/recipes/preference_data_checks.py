"""What is checked of preference rows before a model is loaded: that ends are learned, that labels
are of two kinds."""

from argparse import Namespace
from typing import Any

import numpy as np

from coati.dataset.data_types import type_of_row
from coati.models.loss import balance
from coati.utils.logging import get_logger

logger = get_logger(__name__)

LOOKED_AT = 256
WEIGHTS = (1.0, 4 / 3)  # of good answers to bad ones in all (arXiv 2402.01306, section 4.2)


def check_ends(rows: Any, tokenizer: Any, template: Any) -> None:
    """Say when no answer among the first rows ends with a supervised end token."""
    ends = {tokenizer.eos_token_id}
    if template is not None:
        ends |= {stop[-1] for stop in template.stop_ids if stop}
    first = [
        type_of_row(row).sides(row)[0] for row in rows.select(range(min(len(rows), LOOKED_AT)))
    ]
    last = [side.ids[side.end() - 1] if side.end() else None for side in first]
    if not ends & set(last):
        logger.info(
            f"warning: none of the first {len(last)} answers of --dataset ends with a "
            "supervised end token "
            f"(ids {', '.join(map(str, sorted(ends)))}): the model will not learn to stop. Look at "
            "end_of_assistant and stop_ids of the conversation template, and prepare the data again"
        )


def kto_weights(args: Namespace, rows: Any) -> tuple[float, float]:
    """The weights of desirable and undesirable answers; set by ``--auto_weight``, else checked for
    balance.

    Raises ValueError when all rows have one label.
    """
    good = int(np.asarray(rows["label"], dtype=bool).sum())
    bad = len(rows) - good
    if not good or not bad:
        kind, flag = ("desirable", "false") if good else ("undesirable", "true")
        raise ValueError(
            f"--dataset holds {kind} answers only ({len(rows)} rows): KTO learns from the "
            "difference. Add rows with "
            f"label {flag}" + (", or train on these with train_sft.py" if good else "")
        )
    weights = (args.desirable_weight, args.undesirable_weight)
    ratio = balance(good, bad, *weights)
    if WEIGHTS[0] <= ratio <= WEIGHTS[1]:
        return weights
    what = f"{good} desirable and {bad} undesirable answers with weights {weights[0]:g} and {weights[1]:g}"
    if not args.auto_weight:
        logger.info(
            f"{what}: their ratio {ratio:.2f} is outside 1 to 4/3, one kind drowns the other; "
            "--auto_weight sets it"
        )
        return weights
    settled = (weights[0] / ratio, weights[1])
    logger.info(
        f"{what}: --auto_weight sets --desirable_weight {settled[0]:.4f}, so that both weigh alike"
    )
    return settled
