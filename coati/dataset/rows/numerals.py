"""Numbers as rows write them: JSON numbers, or texts of one."""

import math
from typing import Any


def number_of(value: Any) -> float:
    """``value`` as a number; nan for what is none, or too large to be one."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def index_of(value: Any) -> int | None:
    """``value`` as an index from 0, perhaps written as a text; None for what is none."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value if value >= 0 else None
    digits = value.strip() if isinstance(value, str) else ""
    return int(digits) if digits.isdecimal() and len(digits) < 10 else None


def is_number(value: Any) -> bool:
    """Whether ``value`` is a number that says something: neither a truth value nor nan nor
    infinite, which is how tables write what is missing."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, int) or math.isfinite(value)
