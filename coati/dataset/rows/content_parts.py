"""A content that is a list of parts: texts, thoughts, calls of tools and their results, in the
spellings of OpenAI, Anthropic and LLaMA-Factory."""

from dataclasses import dataclass, field
from typing import Any

from coati.dataset.rows.column_use import ColumnUse, Fields
from coati.dataset.rows.row_errors import RowError
from coati.dataset.rows.tool_calls import Call, calls_of

TEXTS = (None, "text", "input_text", "output_text")
THOUGHTS = ("thinking", "reasoning", "thought")
CALLS = ("tool_use", "tool_call", "function_call", "function")
RESULTS = ("tool_result",)
PICTURES = ("image", "image_url", "input_image", "audio", "input_audio", "video", "video_url")
# Where the text of a part stands.
_TEXT_KEYS = ("text", "value", "content")


@dataclass
class Parts:
    """``results``: {content, tool_call_id} of each result of a tool."""

    text: str = ""
    thought: str = ""
    calls: list[Call] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)


def read_parts(found: list, use: ColumnUse, path: str, where: str) -> Parts:
    """The parts by their kinds. Raises RowError for one that is neither text nor of a known
    kind, a picture for instance."""
    parts = Parts()
    for part in found:
        if not isinstance(part, dict):
            _refuse(type(part).__name__, where)
        kind = part.get("type")
        fields = Fields(part, use, f"{path}.")
        fields.get("type")
        if kind in TEXTS:
            parts.text += _text(fields, _TEXT_KEYS, kind, where)
        elif kind in THOUGHTS:
            parts.thought += _text(fields, (kind, *_TEXT_KEYS), kind, where)
        elif kind in CALLS:
            key = fields.first(("value", "tool_call", "function_call"))
            call = part if key is None else fields[key]
            parts.calls += calls_of(call, use, f"{path}.", where)
            if key is None:
                continue  # the call accounts for the fields of the part
        elif kind in RESULTS:
            parts.results.append(_result(fields, where))
        else:
            _refuse(kind, where)
        fields.close()
    return parts


def _text(fields: Fields, keys: tuple, kind: Any, where: str) -> str:
    key = next((key for key in keys if isinstance(fields.peek(key), str)), None)
    if key is None:
        _refuse(kind or "an object", f"{where}", " without text")
    return fields[key]


def _result(fields: Fields, where: str) -> dict[str, Any]:
    found = fields.get("content") if fields.peek("content") is not None else fields.get("value", "")
    if isinstance(found, list):
        inner = read_parts(found, fields.use, f"{fields.path}content[]", where)
        found = inner.text
    if not isinstance(found, str):
        _refuse(type(found).__name__, where)
    result = {"content": found}
    key = fields.first(("tool_use_id", "tool_call_id"))
    if key is not None and isinstance(fields.peek(key), str):
        result["tool_call_id"] = fields[key]
    return result


def _refuse(what: Any, where: str, more: str = "") -> None:
    raise RowError(
        "content_not_text",
        f"{where} holds a list with {what}{more} in it; only parts with text, thoughts or calls "
        "can be read",
    )
