"""What this process is doing, for the heartbeat that tells the other ranks of it; and what has to
be done before the process is ended from outside its main thread."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Activity:
    """``step``: optimizer steps done; ``saved``: that of the newest checkpoint; ``ticks``: grows
    with every piece of work, whatever it is."""

    phase: str = "starting"
    step: int | None = None
    saved: int | None = None
    ticks: int = 0


CURRENT = Activity()
_at_forced_end: list[Callable[[str], None]] = []


def note(*, phase: str | None = None, step: int | None = None, saved: int | None = None) -> None:
    """Record what is known now; what is not given stays."""
    for name, value in (("phase", phase), ("step", step), ("saved", saved)):
        if value is not None:
            setattr(CURRENT, name, value)
    tick()


def tick() -> None:
    """A piece of work is done: the process moves."""
    CURRENT.ticks += 1


@contextmanager
def at_forced_end(callback: Callable[[str], None]) -> Iterator[None]:
    """Inside, ``callback(message)`` is called before the process is ended because other ranks are
    lost: in another thread, while the main thread may be stuck in a collective. It must take no
    part in one."""
    _at_forced_end.append(callback)
    try:
        yield
    finally:
        _at_forced_end.remove(callback)


def forced_end_callbacks() -> list[Callable[[str], None]]:
    """The callbacks, the last registered first."""
    return _at_forced_end[::-1]
