"""Callbacks: what a user's own code is told while a run goes on, and how it ends the run early."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from coati.utils.errors import no_early_exit
from coati.utils.logging import get_logger

logger = get_logger(__name__)


class StopTraining(Exception):
    """Raised by a callback: the run ends after the current optimizer step (PPO and GRPO: after the
    current episode), as on SIGTERM, with a checkpoint to go on from. One rank is enough."""


class Callback:
    """Base class of callbacks; every method does nothing unless it is overridden.

    Each is called on every rank, so a method may use collectives if it does so on all of them, and
    should write files on rank 0 alone. Numbers are averaged over the ranks, except times, which are
    each rank's own; their names are those of ``metrics.jsonl``. ``trainer.state.step`` counts
    optimizer steps, and ``trainer.episode`` the episodes of PPO and GRPO.

    A method ends the run early by raising :class:`StopTraining`; any other error ends it at once,
    without a checkpoint, and so does ``sys.exit``, whatever its code.
    """

    def on_train_begin(self, trainer: Any) -> None:
        """Before the first evaluation and the first step, also of a resumed run."""

    def on_step(self, trainer: Any, metrics: dict[str, float]) -> None:
        """After each optimizer step. ``metrics`` of this step: ``train/loss`` (PPO and GRPO:
        ``train/policy_loss``, and ``train/value_loss`` with a critic), ``train/grad_norm`` where
        the plugin knows it, the learning rates, ``train/tokens`` (real tokens of all ranks)."""

    def on_log(self, trainer: Any, metrics: dict[str, float]) -> None:
        """With each line of ``metrics.jsonl`` about training: every ``log_interval`` steps (PPO and
        GRPO: episodes), the ``metrics`` since the line before."""

    def on_evaluate(self, trainer: Any, metrics: dict[str, float]) -> None:
        """After each evaluation, with its ``metrics``, ``eval/...``."""

    def on_save(self, trainer: Any, path: Path) -> None:
        """After each checkpoint; ``path`` is its directory."""

    def on_train_end(self, trainer: Any) -> None:
        """After the last step and evaluation, before the final model is written; not after an
        error. ``trainer.stopped_early`` says whether steps are left."""


class CallbackList:
    """The callbacks of a run, called in their order.

    Raises TypeError for what is not a :class:`Callback`.
    """

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        self.callbacks = list(callbacks)
        for callback in self.callbacks:
            if not isinstance(callback, Callback):
                hint = ", not the class itself" if isinstance(callback, type) else ""
                raise TypeError(
                    f"callbacks: {callback!r} is no coati.Callback; derive from it and give an "
                    f"instance{hint}"
                )
        self.asked_to_stop = False  # of this rank
        self._anywhere: bool | None = None

    def call(self, event: str, trainer: Any, *about: Any) -> None:
        """The method ``event`` of each callback; a :class:`StopTraining` is remembered in
        :attr:`asked_to_stop`, other errors go on to the caller."""
        for callback in self.callbacks:
            try:
                with no_early_exit(f"{type(callback).__name__}.{event}"):
                    getattr(callback, event)(trainer, *about)
            except StopTraining as request:
                logger.info(f"{type(callback).__name__} ends the run: {request or 'no reason'}")
                self.asked_to_stop = True

    def stop_agreed(self) -> bool:
        """Whether a callback of any rank asked to stop. Every rank must call it."""
        from coati.utils.distributed import any_rank  # torch: what derives from Callback needs none

        if self._anywhere is None:  # the ranks need not have the same
            self._anywhere = any_rank(bool(self.callbacks))
        return self._anywhere and any_rank(self.asked_to_stop)
