"""A limit on how long foreign Python code may run, in any thread: a thread beside it raises
:class:`Overrun` in the one that takes too long.

Between two instructions of Python alone: a single call into C (a regular expression, a huge
product) ends first. Where there are such calls, a Unix alarm is stricter
(coati.rewards.time_limit).
"""

import ctypes
import itertools
import os
import threading
import time

LOOKS_S = 0.1
IDLE_S = 5.0  # without anything to watch the thread ends


class Overrun(BaseException):
    """Foreign code took too long; no Exception, so that its own handlers do not catch it."""


_lock = threading.Lock()
_watched: dict[int, tuple[float, int]] = {}  # ticket -> deadline, thread
_tickets = itertools.count()
_watcher: threading.Thread | None = None


class interrupted_after:
    """Context manager: raise :class:`Overrun` inside the block after ``seconds``. No generator and
    no lock: a block may be a rendering of microseconds. Whoever takes its entry out of
    :data:`_watched`, which one step does, decides whether it is interrupted."""

    __slots__ = ("_seconds", "_ticket", "_thread")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        self._ticket = next(_tickets)
        self._thread = threading.get_ident()
        _watched[self._ticket] = (time.monotonic() + self._seconds, self._thread)
        if _watcher is None:
            _watch()

    def __exit__(self, *_: object) -> None:
        if _watched.pop(self._ticket, None) is None:  # it was raised, or is about to be
            with _lock:
                raise_in(self._thread, None)


def _watch() -> None:
    """Start the watching thread, of this process."""
    global _watcher
    with _lock:
        if _watcher is None:
            _watcher = threading.Thread(target=_look, name="coati-watchdog", daemon=True)
            _watcher.start()


def _look() -> None:
    global _watcher
    idle = time.monotonic()
    while True:
        time.sleep(LOOKS_S)
        now = time.monotonic()
        with _lock:
            for ticket, (deadline, thread) in list(_watched.items()):
                if now > deadline and _watched.pop(ticket, None) is not None:
                    raise_in(thread, Overrun)
            idle = now if _watched else idle
            if now - idle > IDLE_S:
                _watcher = None  # first: who comes from here on starts another one
                if not _watched:
                    return
                _watcher = threading.current_thread()
                idle = now


def raise_in(thread: int, kind: type[BaseException] | None) -> None:
    """``kind`` at the next instruction of ``thread``; None takes back what was not raised yet."""
    what = None if kind is None else ctypes.py_object(kind)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), what)


def _forget() -> None:
    """In a child made by fork, which has none of the parent's threads."""
    global _lock, _watcher
    _lock = threading.Lock()
    _watched.clear()
    _watcher = None


os.register_at_fork(after_in_child=_forget)
