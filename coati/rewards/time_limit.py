"""A limit on how long foreign code may take, enforced from within, so that a regular expression
cannot hang a run."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from coati.utils.logging import get_logger
from coati.utils.watchdog import Overrun, interrupted_after

logger = get_logger(__name__)


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise :class:`Overrun` inside the block after ``seconds``; None: never.

    In the main thread of a Unix process an alarm ends calls into C, too. Elsewhere Python code
    alone is limited, and a line says so.
    """
    if seconds is None:
        yield
        return
    if threading.current_thread() is not threading.main_thread() or not hasattr(
        signal, "setitimer"
    ):
        logger.warning_once(
            "reward functions are limited in time between two steps of Python alone here: to end a "
            "regular expression, too, takes the main thread of a Unix process"
        )
        with interrupted_after(seconds):
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
