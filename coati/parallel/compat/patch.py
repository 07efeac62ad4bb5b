"""A named patch of ColossalAI: the upstream line that it corrects, and how to tell that it is still
needed."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

_applied: set[str] = set()


@dataclass(frozen=True)
class Patch:
    """One change to ColossalAI.

    ``upstream`` is the place (``file.py:line`` of ColossalAI 0.5.0). ``still_needed`` is
    true as long as the unpatched code misbehaves; it is asked in a process in which nothing has
    been patched.
    """

    name: str
    upstream: str
    apply: Callable[[], None]
    still_needed: Callable[[], bool]


def apply_all(patches: Iterable[Patch]) -> list[str]:
    """Apply each patch unless this process has already done so; return the names newly applied."""
    fresh = [patch for patch in patches if patch.name not in _applied]
    for patch in fresh:
        patch.apply()
        _applied.add(patch.name)
    return [patch.name for patch in fresh]


def raises(*errors: type[Exception], call: Callable[[], object]) -> Callable[[], bool]:
    """A probe: whether ``call`` fails with one of ``errors``."""

    def probe() -> bool:
        try:
            call()
        except errors:
            return True
        return False

    return probe


def mentions(upstream: Any, *texts: str) -> Callable[[], bool]:
    """A probe: whether the source of a function or module contains all ``texts``."""
    return lambda: all(text in inspect.getsource(upstream) for text in texts)


def lacks(upstream: Any, text: str) -> Callable[[], bool]:
    """A probe: whether the source of a function or module does not contain ``text``."""
    return lambda: text not in inspect.getsource(upstream)
