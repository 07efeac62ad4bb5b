"""The thought of an assistant's turn, however it is written: a field of its own, or
``<think>`` text before the answer."""

from typing import Any

from coati.dataset.rows.column_use import Fields
from coati.dataset.rows.row_errors import RowError

FIELDS = ("reasoning_content", "reasoning", "thinking", "thought")
OPEN = "<think>"
CLOSE = "</think>"


def split_thought(content: str) -> tuple[str, list[str], str]:
    """``(thought, marks, answer)`` of a content that begins with ``<think>...</think>``, or with a
    thought whose opening tag the generation prompt wrote: ``marks`` are what stands before the
    thought and between it and the answer, so that ``marks[0] + thought + marks[1] + answer`` is
    the content. Without a thought ``("", [], content)``; of a blank one all is in the marks."""
    before, close, rest = content.partition(CLOSE)
    if not close:
        return "", [], content
    inner = before.lstrip()
    if inner.startswith(OPEN):
        inner = inner[len(OPEN) :]
    else:
        # Without the opening tag only one on a line of its own closes a thought: others are spoken
        # of.
        alone = before.endswith("\n") and (not rest or rest.startswith("\n"))
        if not alone or OPEN in before:
            return "", [], content
        inner = before
    answer = rest.lstrip("\n")
    thought = inner.strip("\n") if inner.strip() else ""
    first = len(before) - len(inner.lstrip("\n")) if thought else len(before)
    between = content[first + len(thought) : len(content) - len(answer)]
    return thought, [before[:first], between], answer


def field_thought(fields: Fields, where: str) -> str:
    """The thought in a field of its own, "" where there is none. Raises RowError for a thought that
    is not text."""
    key = next((key for key in FIELDS if _holds(fields.peek(key))), None)
    if key is None:
        return ""
    found = fields[key]
    if isinstance(found, dict):
        found = [found]
    if isinstance(found, list):
        found = "".join(_part(one, f"{where}: {key}") for one in found)
    if not isinstance(found, str):
        raise RowError(
            "content_not_text", f"{where}: {key} holds {type(found).__name__} instead of a string"
        )
    for other in FIELDS:  # the same thought under two names
        if other != key and fields.peek(other) == found:
            fields.get(other)
    return found


def _holds(value: Any) -> bool:
    return bool(value.strip()) if isinstance(value, str) else bool(value)


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict):
        for key in ("text", "thinking", "reasoning", "value", "summary"):
            if isinstance(part.get(key), str) and set(part) <= {key, "type"}:
                return part[key]
    raise RowError("content_not_text", f"{where} holds {type(part).__name__} without plain text")


def given_marks(fields: Fields) -> list[str]:
    """What a model wrote before and behind the thought of the field, as ``coati chat`` writes it
    down; empty where the file has nothing of the kind."""
    found = fields.peek("thought_marks")
    if isinstance(found, list) and list(map(type, found)) == [str, str]:
        return fields["thought_marks"]
    return []


def one_thought(field: str, spoken: str, where: str) -> str:
    """The thought of a field and that of the content as one. Raises RowError when they differ."""
    if field.strip() and spoken.strip() and field.strip() != spoken.strip():
        raise RowError(
            "two_thoughts", f"{where} has a thought in a field of its own, and another as {OPEN}"
        )
    return field if field.strip() else spoken
