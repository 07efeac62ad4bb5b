"""A limit on how long foreign code may take, enforced from within, so that a regular expression
cannot hang a run."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from coati.utils.logging import get_logger

logger = get_logger(__name__)


class Overrun(BaseException):
    """Foreign code took too long; no Exception, so that its own handlers do not catch it."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise :class:`Overrun` inside the block after ``seconds``; None: never.

    Needs the main thread and a Unix alarm; without them nothing is limited, and a line says so.
    """
    if seconds is None:
        yield
        return
    if threading.current_thread() is not threading.main_thread() or not hasattr(
        signal, "setitimer"
    ):
        logger.warning_once(
            "reward functions run without a time limit here: it needs the main thread of a Unix "
            "process"
        )
        yield
        return

    def overrun(number, frame):
        raise Overrun

    previous = signal.signal(signal.SIGALRM, overrun)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
