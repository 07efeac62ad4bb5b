"""Calls of tools and the tools themselves, in OpenAI's form whatever the file writes: objects, JSON
text, flat or nested, one or several."""

import json
import re
from collections.abc import Iterator
from typing import Any

from coati.dataset.rows.column_use import ColumnUse, Fields
from coati.dataset.rows.embedded_text import decoded, has_half_character
from coati.dataset.rows.row_errors import RowError

Call = dict[str, Any]
ARGUMENTS = ("arguments", "parameters", "args", "input", "kwargs")
KINDS = ("function", "tool_use", "tool_call", "function_call")
# <tool_call> of Hermes and Qwen, <functioncall> of Glaive.
_TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_GLAIVE = re.compile(r"<functioncall>\s*", re.IGNORECASE)
_QUOTED_ARGUMENTS = re.compile(
    r"""(["'](?:arguments|parameters)["']\s*:\s*)'(.*)'(\s*\}\s*)$""", re.DOTALL
)
_RESULT = re.compile(r"\s*<tool_response>\s*(.*?)\s*</tool_response>\s*", re.DOTALL)


def calls_of(found: Any, use: ColumnUse, path: str, where: str) -> list[Call]:
    """The calls of ``found``: a call, a list of them, or JSON text of either. Raises RowError."""
    if isinstance(found, str):
        found = _decoded_call(found, where)
    if isinstance(found, dict):
        found = [found]
    if not isinstance(found, list):
        raise RowError("bad_tool_call", f"{where} holds {found!r:.80}, expected a call or a list")
    return [_call(one, use, path, where) for one in found]


def _decoded_call(text: str, where: str) -> Any:
    """A call as text. Glaive puts the arguments, which are JSON, between single quotes."""
    if (found := decoded(text)) is not None:
        return found
    quoted = _QUOTED_ARGUMENTS.search(text.strip())
    if quoted:
        arguments = quoted[2].replace("\\'", "'")
        plain = f"{text.strip()[: quoted.start()]}{quoted[1]}{arguments}{quoted[3]}"
        if (found := decoded(plain)) is not None:
            return found
    raise RowError("bad_tool_call", f"{where} holds {text[:80]!r}, expected JSON of a call")


def _call(found: Any, use: ColumnUse, path: str, where: str) -> Call:
    if isinstance(found, str):
        found = _decoded_call(found, where)
    if not isinstance(found, dict):
        raise RowError("bad_tool_call", f"{where} holds {type(found).__name__} as a call")
    outer = Fields(found, use, path)
    if outer.peek("type") in KINDS:
        outer.get("type")
    inner = outer
    if isinstance(outer.peek("function"), dict):
        inner = outer.inside("function")
    name = inner.get("name")
    if name is None and isinstance(outer.peek("function"), str):
        name = outer.get("function")
    if not isinstance(name, str) or not name:
        raise RowError("bad_tool_call", f"{where} calls a function without a name: {found!r:.80}")
    key = inner.first(ARGUMENTS)
    call: Call = {
        "type": "function",
        "function": {"name": name, "arguments": _arguments(key and inner[key], name, where)},
    }
    call_id = outer.get("id")
    if isinstance(call_id, str) and call_id:
        call["id"] = call_id
    elif call_id is not None:
        outer.unread("id")
    outer.close()
    return call


def _arguments(found: Any, name: str, where: str) -> dict[str, Any]:
    if found is None or (isinstance(found, str) and found.strip() in ("", "null")):
        return {}
    if isinstance(found, str):
        text = found
        found = decoded(text)
        if not isinstance(found, dict):
            raise RowError(
                "bad_tool_call",
                f"{where}: the arguments of {name} are {text[:60]!r}, expected a JSON object",
            )
    if not isinstance(found, dict):
        raise RowError(
            "bad_tool_call",
            f"{where}: the arguments of {name} are {found!r:.60}, expected an object",
        )
    return found


def spoken_calls(content: str, use: ColumnUse, path: str, where: str) -> tuple[str, list[Call]]:
    """``(text, calls)`` of a content with ``<tool_call>`` or ``<functioncall>`` in it; the content
    and no calls where there are none, or where they are only spoken of."""
    if "<tool_call>" in content:
        parts = _TAGGED.findall(content)
        rest = _TAGGED.sub("", content)
        if parts and "<tool_call>" not in rest and all(map(_looks_like_call, parts)):
            calls = [call for part in parts for call in calls_of(part, use, path, where)]
            return rest.strip(), calls
    mark = _GLAIVE.search(content)
    if mark:
        call = content[mark.end() :].replace("<|endoftext|>", "").strip()
        return content[: mark.start()].strip(), calls_of(call, use, path, where)
    return content, []


def _looks_like_call(text: str) -> bool:
    found = decoded(text)
    calls = found if isinstance(found, list) else [found]
    return bool(calls) and all(isinstance(one, dict) and "name" in one for one in calls)


def result_text(content: str) -> str:
    """A tool's result without the ``<tool_response>`` that Hermes puts around it."""
    whole = _RESULT.fullmatch(content)
    return whole[1] if whole and "<tool_response>" not in whole[1] else content


def tools_of(found: Any, where: str) -> list[dict[str, Any]] | None:
    """OpenAI's function schemas of a column of tools: a list, one of them, or JSON text, each with
    or without ``{"type": "function", "function": ...}`` around it. Raises RowError."""
    if isinstance(found, str):
        text = found
        if text.strip().lower() in ("", "null", "none"):
            return None
        found = decoded(text)
        if found is None:
            found = list(_objects(text)) or None
        if found is None:
            raise RowError("bad_tools", f"{where} holds {text[:60]!r}, expected JSON")
    if isinstance(found, dict):
        found = [found]
    if not isinstance(found, list):
        raise RowError("bad_tools", f"{where} holds {type(found).__name__}, expected a list")
    return [_tool(one, where) for one in found] or None


def _tool(found: Any, where: str) -> dict[str, Any]:
    if isinstance(found, str):
        found = decoded(found)
    if not isinstance(found, dict):
        raise RowError("bad_tools", f"{where} holds {found!r:.60}, expected a function's schema")
    schema = found.get("function")
    if isinstance(schema, dict) and isinstance(schema.get("name"), str):
        return {**found, "type": found.get("type") or "function"}
    if not isinstance(found.get("name"), str):
        raise RowError("bad_tools", f"{where} holds a function without a name: {found!r:.60}")
    if found.get("type") == "function":  # OpenAI's Responses: flat beside its type
        found = {key: value for key, value in found.items() if key != "type"}
    return {"type": "function", "function": found}


def _objects(text: str) -> Iterator[dict]:
    """The JSON objects that stand one after the other in ``text``; nothing where something else
    stands between them."""
    objects, rest = leading_objects(text)
    if not rest.strip():
        yield from objects


def leading_objects(text: str) -> tuple[list[dict], str]:
    """The JSON objects that ``text`` begins with, and what follows them."""
    decoder = json.JSONDecoder()
    found = []
    rest = text.lstrip().lstrip(",")
    while rest[:1] == "{":
        try:
            one, end = decoder.raw_decode(rest)
        except (ValueError, RecursionError):
            break
        if has_half_character(one):
            break
        found.append(one)
        rest = rest[end:].lstrip().lstrip(",").lstrip()
    return found, rest
