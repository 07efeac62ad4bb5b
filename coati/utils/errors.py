"""Failures that a user can mend, and ends that are none."""

import linecache
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

EARLY = 70  # EX_SOFTWARE: what the exit code 0 of a process becomes that has not reached its end
LIBRARY = Path(__file__).resolve().parents[1]


class RunFailed(RuntimeError):
    """A failure that its message explains: programs end with that line instead of a traceback."""


def raised_at(error: BaseException) -> str:
    """``file:line`` of the innermost code, outside imports, that raised; "" where that is
    unknown."""
    frames = [
        (frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    places = [f"{file}:{line}" for file, line in frames if "importlib" not in file]
    return places[-1] if places else ""


@contextmanager
def no_early_exit(what: str = "the run") -> Iterator[None]:
    """Whatever is no Exception and comes from code that is not this library's (SystemExit of a
    user's function, whatever its code, GeneratorExit, classes of its own) is a failure of ``what``,
    not its end.

    Raises RunFailed with file and line. Ctrl-C stays one: it strikes in any line, a
    KeyboardInterrupt of the code's own in one that names it.
    """
    try:
        yield
    except Exception:
        raise
    except BaseException as error:
        place = raised_at(error)
        file, _, line = place.rpartition(":")
        ours = file.startswith(f"{LIBRARY}/")
        if isinstance(error, SystemExit) and ours:
            raise
        if isinstance(error, KeyboardInterrupt) and (
            ours or "KeyboardInterrupt" not in linecache.getline(file, int(line or 0))
        ):
            raise
        raise RunFailed(f"{what} was ended early by {named(error)}") from error


@contextmanager
def no_silent_exit(say: Callable[[str], None]) -> Iterator[None]:
    """Inside, ``os._exit(0)``, which no handler sees, ends this process with EARLY, once ``say``
    has been told where it was called. Processes that it forks leave as they like."""
    leave = os._exit
    mine = os.getpid()

    def end(status: int) -> None:
        if status == 0 and os.getpid() == mine:
            caller = sys._getframe(1)
            place = f"{caller.f_code.co_filename}:{caller.f_lineno}"
            say(f"the run was ended early by os._exit(0) at {place}")
            status = EARLY
        leave(status)

    os._exit = end  # type: ignore[assignment]
    try:
        yield
    finally:
        os._exit = leave


def named(error: BaseException) -> str:
    """Kind, text and place of an error that ended foreign code."""
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, SystemExit):
        said = f"sys.exit({'' if error.code is None else repr(error.code)})"
    place = raised_at(error)
    return f"{said} at {place}" if place else said
