"""Texts that are themselves JSON or Python of messages, as csv files and careless exports hold
them."""

import ast
import json
import re
from typing import Any

from coati.dataset.rows.row_errors import CALL_ROLES, ROW_ROLES, RowError

SPEAKERS = frozenset((*ROW_ROLES, *CALL_ROLES))
LONGEST_LITERAL = 1 << 20  # characters that are read as Python
DEEPEST = 200  # objects and lists one in another, as many as all that follows can take
NEAR = 10_000  # characters in which the first role stands
# A key of a message: "role": ..., 'from': ..., \"value\": ...
_KEY = re.compile(r"""["'](?:role|from|content|value)\\*["']\s*:""")
_MESSAGES = re.compile(
    r"""^\s*["']?(?:array\()?\s*(?:[\[({]\s*)+\\*["'](?:role|from|content|value)\\*["']\s*:"""
)
_KEYED = re.compile(r"""^\s*["']?\{\s*\\*["'](?:messages|conversations?)\\*["']\s*:\s*\[""")
_SPEAKER = re.compile(
    rf"""["'](?:role|from)\\*["']\s*:\s*\\*["'](?:{"|".join(sorted(SPEAKERS))})\\*["']""",
    re.IGNORECASE,
)
OPENERS = frozenset("[{(\"'a \t\r\n")  # what such a text may begin with


def decoded(text: str) -> Any:
    """The list or object that ``text`` writes as JSON or Python, also when it was quoted twice;
    None when it writes neither."""
    found: Any = text
    for _ in range(3):
        if not isinstance(found, str) or found.lstrip()[:1] not in tuple("[{(\"'"):
            break
        found = _once(found.strip())
    return found if isinstance(found, list | dict) else None


def _once(text: str) -> Any:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = _literal(text)
    if "\\" in text and has_half_character(found):
        return None
    return None if is_too_deep(found, text.count("[") + text.count("{")) else found


def _literal(text: str) -> Any:
    if len(text) > LONGEST_LITERAL:
        return None
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return list(found) if isinstance(found, tuple) else found


def is_too_deep(found: Any, brackets: int) -> bool:
    """Whether ``found``, with so many ``brackets`` in its text, is nested deeper than DEEPEST."""
    if brackets <= DEEPEST:
        return False
    level = [found]
    for _ in range(DEEPEST + 1):
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
    return bool(level)


def has_half_character(found: Any) -> bool:
    """Whether a text in ``found`` holds one of the two escapes that a character beyond 16 bits
    takes without the other: no UTF-8 can write it."""
    try:
        json.dumps(found, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError:
        return True
    except (ValueError, TypeError, RecursionError):  # Python's sets and odd keys
        return False
    return False


def is_messages_text(text: str) -> bool:
    """Whether ``text`` as a whole is JSON or Python of a message or of messages, well-formed or
    not."""
    if not _SPEAKER.search(text, 0, NEAR):
        return False
    found = decoded(text)
    if found is not None:
        return _holds_messages(found)
    head = text[:NEAR]
    if not (_MESSAGES.search(head) or _KEYED.search(head)):
        return False
    # Cut, or as numpy prints it: no text to train on either, unless prose follows.
    after = re.split(r"[\])}]", text)[-1]
    return not re.search(r"\w", after) or bool(_KEY.search(after))


def _holds_messages(found: Any) -> bool:
    if isinstance(found, dict):
        inner = next(
            (found[k] for k in ("messages", "conversations", "conversation") if k in found), None
        )
        if isinstance(inner, list):
            return _holds_messages(inner)
        role = found.get("role") or found.get("from")
        known = isinstance(role, str) and role.lower() in SPEAKERS
        return known and ("content" in found or "value" in found)
    return isinstance(found, list) and bool(found) and all(map(_holds_messages, found))


def messages_of(text: str, key: str) -> list:
    """The list of messages that ``text``, found under ``key``, writes. Raises RowError."""
    found = decoded(text)
    if isinstance(found, dict):
        found = found.get("messages") or found.get("conversations") or [found]
    if not isinstance(found, list):
        raise RowError("messages_as_text", f"{key} holds {text[:60]!r}")
    return found


def check_no_messages(text: str, where: str) -> None:
    """Raise RowError for a text that is itself a list of messages."""
    if text[:1] in OPENERS and is_messages_text(text):
        raise RowError("messages_as_text", f"{where} holds {text[:60]!r}")
