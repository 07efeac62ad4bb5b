"""What a run may be given that no flag can name: objects of a Python caller."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from coati.trainer.callbacks import Callback


@dataclass(frozen=True)
class Extras:
    """Beside the settings of a run.

    Args:
        callbacks: of the trainer.
        loss: a loss of the caller's own: of tokens (SFT), of pairs (DPO), of the tokens of
            responses (PPO and GRPO); see docs/python.md.
        rewards: reward functions by their names among ``--reward_functions``, ``python:name``.
        again: how to go on with a run that ended early, for its last message; None: the command
            line with ``--checkpoint_path auto``.
    """

    callbacks: tuple[Callback, ...] = ()
    loss: Callable[..., Any] | None = None
    rewards: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    again: str | None = None


NO_EXTRAS = Extras()
