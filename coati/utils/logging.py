"""The library's logger: messages to its user outside metrics, on standard error of rank 0.

``logging.getLogger("coati")`` silences or redirects them as any other logger.
"""

import logging
import os
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

ROOT = "coati"
_WARNINGS: deque[str] = deque(maxlen=100)
_collecting = False


class _Rank0Handler(logging.Handler):
    """Writes ``coati: message`` to the standard error of rank 0, without breaking a progress
    bar."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            _WARNINGS.append(record.getMessage())
        if _collecting:
            return
        # The launcher's variable, not torch.distributed: messages are needed before a process group
        # exists.
        if os.environ.get("RANK", "0") != "0":
            return
        line = f"coati: {record.getMessage()}"
        tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
        if tqdm is not None:
            tqdm.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)


class Logger(logging.LoggerAdapter):
    """A logger of the library, with :meth:`warning_once` and :meth:`info_once`."""

    _warned: set[str] = set()

    def warning_once(self, message: str) -> None:
        """:meth:`warning`, but the same message only once per process."""
        if message not in self._warned:
            self._warned.add(message)
            self.warning(message)

    def info_once(self, message: str) -> None:
        """:meth:`info`, but the same message only once per process."""
        if message not in self._warned:
            self._warned.add(message)
            self.info(message)


def get_logger(name: str) -> Logger:
    """The logger of module ``name``, below ``"coati"``, whose level is INFO unless it was set."""
    root = logging.getLogger(ROOT)
    if not any(isinstance(handler, _Rank0Handler) for handler in root.handlers):
        root.addHandler(_Rank0Handler())
        root.propagate = False
    if root.level == logging.NOTSET:
        root.setLevel(logging.INFO)
    inside = name == ROOT or name.startswith(f"{ROOT}.")
    return Logger(logging.getLogger(name if inside else f"{ROOT}.{name}"))


@contextmanager
def unsaid(when: bool = True) -> Iterator[None]:
    """``when``: show nothing meanwhile; warnings are still among :func:`take_warnings`."""
    global _collecting
    before = _collecting
    _collecting = when
    try:
        yield
    finally:
        _collecting = before


def forget_warnings() -> None:
    """Let :meth:`Logger.warning_once` and the like repeat themselves, as in a new process."""
    Logger._warned.clear()


def take_warnings() -> list[str]:
    """The warnings of this process since this was last called, the last hundred of them."""
    taken = list(_WARNINGS)
    _WARNINGS.clear()
    return taken
