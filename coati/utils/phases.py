"""Says what a process is doing where it takes long: ``with phase("loading the model"):``.

Nothing is said of a phase shorter than :data:`FIRST_S`. Of a longer one a line tells how long it
has been going on, again at growing intervals, and how long it took. Of phases inside each other the
innermost speaks that is itself long enough. Rank 0 speaks alone.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from coati.utils.interrupt import check, interrupts_noted
from coati.utils.logging import get_logger

logger = get_logger(__name__)

FIRST_S = 5.0  # until the first line
GAP_S = (10.0, 20.0, 40.0, 80.0, 160.0, 300.0)  # to the next ones; the last one repeats


class Phase:
    """What is going on. ``detail`` may change meanwhile ("batch 3 of 10"); ``closing``: whether its
    end is said; ``shown``: a progress bar shows it, so that nothing need be said."""

    def __init__(self, what: str, closing: bool = True) -> None:
        self.what = what
        self.detail = ""
        self.closing = closing
        self.shown = False
        self.began = time.monotonic()
        self.told = 0  # lines about it
        self.lines = 0  # those of phases inside it too
        self._due = self.began + FIRST_S

    def due(self, now: float) -> bool:
        return now >= self._due

    def put_off(self, now: float) -> None:
        """After a line, of this phase or of one inside it: the next one comes later."""
        self._due = now + GAP_S[min(self.lines, len(GAP_S) - 1)]
        self.lines += 1

    def restart(self, first_s: float = FIRST_S) -> None:
        """Another phase of the same name begins, of which nothing is said for ``first_s``."""
        self.began = time.monotonic()
        self.told = 0
        self.lines = 0
        self._due = self.began + first_s


_open: list[Phase] = []  # the innermost last
_lock = threading.Lock()
_watcher: threading.Thread | None = None


@contextmanager
def phase(what: str, closing: bool = True) -> Iterator[Phase]:
    """Say that ``what`` is being done, if it takes long. ``what`` begins with a verb in -ing."""
    current = begin(what, closing)
    done = False
    try:
        yield current
        done = True
    finally:
        end(current, done)


def begin(what: str, closing: bool = True) -> Phase:
    """:func:`phase` for what is no block; :func:`end` ends it."""
    check()
    current = Phase(what, closing)
    if os.environ.get("RANK", "0") == "0":
        with _lock:
            _open.append(current)
            _start_watcher()
    return current


def end(current: Phase, done: bool = True) -> None:
    """End what :func:`begin` began; ``done``: without an error."""
    with _lock:
        if current in _open:
            _open.remove(current)
    if done and current.closing and current.told:
        logger.info(f"{current.what} took {duration(time.monotonic() - current.began)}")


def duration(seconds: float) -> str:
    """``seconds`` as people say them: 42 s, 3 min 5 s, 2 h 10 min."""
    whole = int(seconds + 0.5)
    minutes, rest = divmod(whole, 60)
    hours, left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {left} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def import_libraries() -> None:
    """Import what every model needs, which takes long from a cold or a shared disk."""
    with interrupts_noted(), phase("importing torch and transformers"):
        import_module("torch")
        import_module("transformers")


def _start_watcher() -> None:
    global _watcher
    if _watcher is None or not _watcher.is_alive():
        _watcher = threading.Thread(target=_watch, name="coati-phases", daemon=True)
        _watcher.start()


def _watch() -> None:
    """Until nothing is going on."""
    global _watcher
    while True:
        time.sleep(min(0.5, FIRST_S / 5))
        now = time.monotonic()
        with _lock:
            if not _open:
                _watcher = None
                return
            late = next((each for each in reversed(_open) if each.due(now)), None)
            if late is not None:
                late.told += not late.shown
                for each in _open:
                    each.put_off(now)
        if late is not None and not late.shown:
            detail = f", {late.detail}" if late.detail else ""
            logger.info(f"{late.what}{detail}: {duration(now - late.began)} so far")


def _forget() -> None:
    """In a forked process, which has no watcher and does nothing of what its parent was doing."""
    global _lock, _watcher
    _lock = threading.Lock()
    _watcher = None
    _open.clear()


os.register_at_fork(after_in_child=_forget)
