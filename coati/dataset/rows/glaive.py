"""Glaive's function-calling dialogues: one text of turns, the functions in the system message."""

import re

from coati.dataset.rows.column_use import ColumnUse, Fields
from coati.dataset.rows.messages import Messages, message_list, text
from coati.dataset.rows.row_errors import RowError
from coati.dataset.rows.source_row import SourceRow
from coati.dataset.rows.tool_calls import leading_objects, tools_of

_TURN = re.compile(
    r"(?:^|\n)\s*(USER|ASSISTANT|FUNCTION CALL|FUNCTION RESPONSE):[ \t]?", re.IGNORECASE
)
_ROLES = {
    "USER": "user",
    "ASSISTANT": "assistant",
    "FUNCTION CALL": "function_call",
    "FUNCTION RESPONSE": "tool",
}
_END = "<|endoftext|>"


def is_glaive(row: object) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("chat"), str):
        return False
    return bool(_TURN.match(row["chat"]))


def glaive(row: Fields) -> SourceRow:
    """The turns of ``chat``, and the functions of ``system`` as tools."""
    system = text(row.get("system") or "", "system").removeprefix("SYSTEM:").strip()
    before, brace, after = system.partition("{")
    found, rest = leading_objects(brace + after)
    tools = None
    if found and all("name" in one for one in found):
        tools = tools_of(found, "system")
        system = "\n".join(part for part in (_prose(before), rest.strip()) if part)
    messages: Messages = [{"role": "system", "content": system}] if system else []
    return SourceRow(messages=messages + _turns(row["chat"], row.use), tools=tools)


def _prose(before: str) -> str:
    """The text before the functions, without the words that announce them."""
    lead = re.search(r"\s+with access to the following functions\b", before)
    if lead:
        return before[: lead.start()].rstrip(" .,-") + "."
    return before.strip()


def _turns(chat: str, use: ColumnUse) -> Messages:
    marks = list(_TURN.finditer(chat))
    if not marks or chat[: marks[0].start()].strip():
        raise RowError("wrong_keys", f"chat must begin with USER:, found {chat[:40].strip()!r}")
    ends = [mark.start() for mark in marks[1:]] + [len(chat)]
    turns = [
        {
            "role": _ROLES[mark[1].upper()],
            "content": chat[mark.end() : end].replace(_END, "").strip(),
        }
        for mark, end in zip(marks, ends, strict=True)
    ]
    return message_list(turns, "chat", use)
