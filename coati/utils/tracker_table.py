"""The experiment trackers that ``--report_to`` names. Imports none of them."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

NONE = "none"
# Name -> what it is; the package has the same name.
TRACKERS = {
    "tensorboard": "TensorBoard, in --log_dir (default: runs of --save_dir)",
    "wandb": "Weights & Biases (WANDB_MODE=offline works)",
    "trackio": "trackio, in a database of this machine or a space (TRACKIO_SPACE_ID)",
}


def named(report_to: Sequence[str], log_dir: Any = None, use_wandb: bool = False) -> list[str]:
    """The trackers that are asked for, in the order of the table. ``report_to``: names, several in
    one text by commas; :data:`NONE` says that there are no others. A ``log_dir`` asks for
    TensorBoard.

    Raises ValueError for a name that is none, and beside :data:`NONE`.
    """
    words = [word for text in report_to for word in text.split(",") if word]
    for word in words:
        if word not in TRACKERS and word != NONE:
            raise ValueError(
                f"--report_to {word}: runs are reported to {', '.join(TRACKERS)} or none; "
                "metrics.jsonl and report.html are always written"
            )
    if NONE in words and len({*words}) > 1:
        others = " ".join(word for word in words if word != NONE)
        raise ValueError(f"--report_to none {others}: leave none or the others out")
    asked = {*words} | ({"wandb"} if use_wandb else set())
    asked |= {"tensorboard"} if log_dir is not None else set()
    return [name for name in TRACKERS if name in asked]


def missing_problem(name: str) -> str | None:
    """What to run where the tracker ``name`` is not installed; None where it is."""
    if find_spec(name) is not None:
        return None
    return f"--report_to {name}: {name} is not installed; run: pip install {name}"
