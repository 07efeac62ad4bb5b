"""Graceful shutdown: on SIGTERM or Ctrl-C the step finishes, a checkpoint is written, and the
process exits with 0."""

import os
import signal
from typing import Any

from coati.utils.logging import get_logger

logger = get_logger(__name__)


class GracefulStop:
    """Inside ``with GracefulStop() as stop:`` the first SIGTERM or SIGINT sets ``stop.requested``;
    a second Ctrl-C raises KeyboardInterrupt as usual. Outside the main thread (a notebook server's)
    signals stay as they are, and in processes that are forked meanwhile (the pool of a reward
    function, which is ended by SIGTERM)."""

    def __init__(self) -> None:
        self.requested = False
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "GracefulStop":
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._ask)
            except ValueError:  # not the main thread
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame: object) -> None:
        if os.getpid() != self._process:
            signal.signal(number, self._before[number])
            os.kill(os.getpid(), number)
            return
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.requested:
            logger.info(
                f"{signal.Signals(number).name}: finishing this step, then saving (Ctrl-C again: "
                "stop without saving)"
            )
        self.requested = True
