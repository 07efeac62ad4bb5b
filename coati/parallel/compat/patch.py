"""A named patch of ColossalAI: the upstream line that it corrects, and how to tell that it is still
needed."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

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


def raises(*errors: type[Exception], call: Callable[[], object]) -> bool:
    """Whether ``call`` fails with one of ``errors``: what most probes ask."""
    try:
        call()
    except errors:
        return True
    return False
