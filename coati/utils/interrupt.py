"""Ctrl-C is not lost. Raised in a callback of the interpreter's (of a weak reference, say) a
KeyboardInterrupt is printed and forgotten, and code that imports modules lazily turns it into
errors of its own; both happen while torch and transformers are imported."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_noted: list[bool] = []  # of each open block; the innermost last


@contextmanager
def interrupts_noted() -> Iterator[None]:
    """Where Ctrl-C came while the block ran, it ends with KeyboardInterrupt, whatever became of the
    one that was raised. Handlers that are set meanwhile are left alone, and so is a program that
    has one of its own or ignores the signal."""
    alone = threading.current_thread() is threading.main_thread()
    if not alone or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    _noted.append(False)
    signal.signal(signal.SIGINT, _note)
    show = sys.unraisablehook

    def show_others(lost: Any) -> None:
        if lost.exc_type is not KeyboardInterrupt:
            show(lost)

    sys.unraisablehook = show_others
    try:
        yield
    except Exception:
        check()
        raise
    else:
        check()
    finally:
        _noted.pop()
        if sys.unraisablehook is show_others:
            sys.unraisablehook = show
        if signal.getsignal(signal.SIGINT) is _note:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def check() -> None:
    """Raise KeyboardInterrupt where Ctrl-C came since the block began."""
    if _noted and _noted[-1] and threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt


def _note(number: int, frame: FrameType | None) -> None:
    if _noted:
        _noted[-1] = True
    raise KeyboardInterrupt
