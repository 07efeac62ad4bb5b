"""Lists of messages as people write them: spellings of roles and contents, thoughts, calls of tools
and weights, and the order of turns.

Everything here takes decoded JSON and gives messages of {role, content} with the roles system,
user, assistant, tool, or raises RowError naming the message that is wrong. Nothing is changed in
place. A message may further hold ``reasoning_content`` (str), ``thought_marks`` (what stood before
and behind a thought that was a text before the content), ``tool_calls`` (OpenAI's, arguments as
objects), ``name`` and ``tool_call_id`` (of a result), ``weight`` (0 to 1) and ``spans`` ([first,
end, weight] in characters of the content).
"""

import json
import re
from typing import Any

from coati.dataset.rows.column_use import ColumnUse, Fields, holds
from coati.dataset.rows.content_parts import PICTURES, RESULTS, TEXTS, Parts, read_parts
from coati.dataset.rows.embedded_text import (
    OPENERS,
    check_no_messages,
    is_messages_text,
    messages_of,
)
from coati.dataset.rows.row_errors import CALL_ROLES, ROW_ROLES, RowError
from coati.dataset.rows.thoughts import (
    CLOSE,
    field_thought,
    given_marks,
    one_thought,
    split_thought,
)
from coati.dataset.rows.tool_calls import Call, calls_of, result_text, spoken_calls
from coati.dataset.rows.turn_weights import moved, spans_of, weight_of

Message = dict[str, Any]
Messages = list[Message]
# The turns of Anthropic's hh-rlhf texts: each begins with a blank line, the first perhaps without.
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
# Between the turns of HelpSteer2's prompts, whose first is the user's.
_TURN = "<extra_id_1>"
_MARKED = re.compile(rf"\s*{_TURN}(User|Assistant)\n")
# What may be more than text in a response.
_MARKS = (CLOSE, "<tool_call>", "<functioncall>")
# What a response without content may have instead.
BESIDE = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "thought")
_DIALOGUE = {name: role for name, role in ROW_ROLES.items() if role != "tool"}


def is_message_list(row: Any) -> bool:
    return (
        isinstance(row, list)
        and bool(row)
        and all(isinstance(m, dict) and ("role" in m or "from" in m) for m in row)
    )


def message_list(found: Any, key: str, use: ColumnUse | None = None, path: str = "") -> Messages:
    """The messages under ``key``, whose elements have ``role`` or ``from`` and ``content`` or
    ``value``; ``use`` gets what of them is not read, below ``path`` (``key[]``)."""
    if isinstance(found, str) and found[:1] in OPENERS:
        found = messages_of(found, key)
    if not isinstance(found, list):
        raise RowError(
            "wrong_keys", f"{key} must be a list of messages, found {type(found).__name__}"
        )
    plain = [_plain(one) for one in found]
    if all(plain):
        return plain
    use = use or ColumnUse()
    messages: Messages = []
    for index, (one, read) in enumerate(zip(found, plain, strict=True)):
        if read is None:
            messages += _read(one, f"message {index}", use, path or f"{key}[]")
        else:
            messages.append(read)
    return _joined_calls(messages)


def message(found: Any, where: str, use: ColumnUse | None = None, path: str = "") -> Message:
    """One message, ``where`` being its name in what an error says."""
    plain = _plain(found)
    if plain is not None:
        return plain
    messages = _joined_calls(_read(found, where, use or ColumnUse(), path or where))
    if len(messages) != 1:
        raise RowError("wrong_keys", f"{where} must be one message, found {len(messages)}")
    return messages[0]


def spoken(role: str, content: str, where: str, use: ColumnUse) -> Message:
    """A text that a row holds in place of a message, with the thought and the calls in it."""
    if content and content[0] in OPENERS:
        check_no_messages(content, where)
    if role == "assistant" and _is_marked(content):
        return message({"role": role, "content": content}, where, use)
    return {"role": role, "content": content}


def _plain(found: Any) -> Message | None:
    """A message of nothing but role and text; None for one that has to be looked at closely."""
    if type(found) is not dict or len(found) != 2:
        return None
    content = found.get("content") or found.get("value")
    if type(content) is not str or not content:
        return None
    if content[0] in OPENERS and is_messages_text(content):
        return None
    role = found.get("role") or found.get("from")
    known = _DIALOGUE.get(role) if type(role) is str else None
    if known is None or (known == "assistant" and _is_marked(content)):
        return None
    return {"role": known, "content": content}


def _is_marked(content: str) -> bool:
    return "<" in content and any(mark in content for mark in _MARKS)


def _read(found: Any, where: str, use: ColumnUse, path: str) -> Messages:
    """The message or, of one that holds results of tools, messages of ``found``."""
    if not isinstance(found, dict):
        raise RowError("wrong_keys", f"{where} must be an object, found {type(found).__name__}")
    fields = Fields(found, use, f"{path}.")
    role, known = _role(fields, where)
    parts = _content(fields, known, where)
    if known == "tool":
        made = _result(fields, parts)
    elif known == "assistant":
        made = _response(fields, parts, role, where)
    else:
        made = {"role": known, "content": _no_more(parts, where)}
    weight = weight_of(fields, where)
    if weight is not None:
        made["weight"] = weight
    fields.close()
    results = [{"role": "tool", **result} for result in parts.results]
    # Anthropic's results of tools stand in a turn of the user, before what he says.
    return results + ([made] if made["content"] or len(made) > 2 or not results else [])


def _role(fields: Fields, where: str) -> tuple[str, str]:
    """The role as the file spells it, in lower case, and the library's own."""
    key = fields.first(("from", "role"))
    found = None if key is None else fields[key]
    role = found.lower() if isinstance(found, str) else ""
    known = "assistant" if role in CALL_ROLES else ROW_ROLES.get(role)
    if found is None:
        raise RowError("wrong_keys", f"{where} lacks from (or role), found {_names(fields)}")
    if known is None:
        raise RowError(
            "unknown_role",
            f"{where} is from {found!r:.60}; known roles: {', '.join(ROW_ROLES)}",
            str(found),
        )
    return role, known


def _names(fields: Fields) -> str:
    names = (f"{key} (null)" if fields.peek(key) is None else str(key) for key in fields)
    return ", ".join(names) or "no key"


def _content(fields: Fields, known: str, where: str) -> Parts:
    """The content by its kinds; a response may lack it where it calls a tool or has a thought."""
    key = fields.first(("content", "value"))
    if key is None:
        if known == "assistant" and any(fields.peek(one) for one in BESIDE):
            return Parts()
        raise RowError("wrong_keys", f"{where} lacks content (or value), found {_names(fields)}")
    found = fields[key]
    if found == [] and known == "assistant" and any(fields.peek(one) for one in BESIDE):
        return Parts()
    if isinstance(found, str):
        if known != "tool" and found[:1] in OPENERS and found:
            check_no_messages(found, where)
        return Parts(text=found)
    if known == "tool" and not _is_parts(found):
        return Parts(text=json.dumps(found, ensure_ascii=False, default=str))
    if not isinstance(found, list) or not found:
        raise RowError(
            "content_not_text", f"{where} holds {type(found).__name__} instead of a string"
        )
    parts = read_parts(found, fields.use, f"{fields.path}{key}[]", where)
    if known != "tool":
        check_no_messages(parts.text, where)
    return parts


def _is_parts(found: Any) -> bool:
    """Of a result, which may be any JSON: a list of parts."""
    return (
        bool(found)
        and isinstance(found, list)
        and all(
            isinstance(one, dict) and one.get("type") in (*TEXTS[1:], *RESULTS, *PICTURES)
            for one in found
        )
    )


def _no_more(parts: Parts, where: str) -> str:
    """The text of a turn that neither thinks nor calls."""
    if parts.thought or parts.calls:
        what = "a thought" if parts.thought else "a call of a tool"
        raise RowError("unsupported_role", f"{where} holds {what}, which only a response may")
    return parts.text


def _result(fields: Fields, parts: Parts) -> Message:
    made: Message = {"role": "tool", "content": result_text(parts.text)}
    for name in ("name", "tool_call_id"):
        if isinstance(fields.peek(name), str) and fields.peek(name):
            made[name] = fields[name]
    return made


def _response(fields: Fields, parts: Parts, role: str, where: str) -> Message:
    spoken_thought, marks, content = split_thought(parts.text)
    spans = moved(spans_of(fields, parts.text, where), len(parts.text) - len(content), where)
    thought = one_thought(field_thought(fields, where), spoken_thought, where)
    thought = one_thought(parts.thought, thought, where)
    if spoken_thought:
        thought = spoken_thought  # the same, but for white space
    elif thought.strip() or not marks:
        marks = given_marks(fields)
    calls = list(parts.calls)
    if role in CALL_ROLES and content.strip():
        calls += calls_of(content, fields.use, f"{fields.path}content.", where)
        content = ""
    else:
        before = content
        content, said = spoken_calls(content, fields.use, f"{fields.path}content.", where)
        calls += said
        if spans and content != before:
            raise RowError("bad_weight", f"{where}: train_detail weighs a text with calls in it")
    calls += _field_calls(fields, where)
    made: Message = {"role": "assistant", "content": content}
    if thought.strip():
        made["reasoning_content"] = thought
    if marks:
        made["thought_marks"] = marks
    if calls:
        made["tool_calls"] = calls
    if spans:
        made["spans"] = spans
    return made


def _field_calls(fields: Fields, where: str) -> list[Call]:
    """The calls in fields of their own; ``function_call`` may repeat one of ``tool_calls``."""
    calls: list[Call] = []
    for key in ("tool_calls", "function_call"):
        if isinstance(fields.peek(key), dict | list | str) and holds(fields.peek(key)):
            found = calls_of(fields[key], fields.use, f"{fields.path}{key}[].", where)
            known = [call["function"] for call in calls]
            calls += [call for call in found if call["function"] not in known]
    return calls


def _joined_calls(messages: Messages) -> Messages:
    """Turns of the assistant that only call are one with the turn before them: some files write
    each call, or the words before it, as a turn of its own."""
    joined: Messages = []
    for one in messages:
        last = joined[-1] if joined else None
        follows = last is not None and last["role"] == one["role"] == "assistant"
        if follows and "tool_calls" in one and not one["content"] and "spans" not in last:
            if last.get("weight") == one.get("weight") and not _thinks(one):
                calls = [*last.get("tool_calls", []), *one["tool_calls"]]
                joined[-1] = {**last, "tool_calls": calls}
                continue
        joined.append(one)
    return joined


def _thinks(one: Message) -> bool:
    return "reasoning_content" in one or "thought_marks" in one


def text(value: Any, where: str) -> str:
    """A string, or OpenAI's list of ``{"type": "text", "text": ...}`` parts joined."""
    if isinstance(value, list) and value:
        use = ColumnUse()
        parts = read_parts(value, use, "", where)
        if use.left:
            raise RowError("content_not_text", f"{where} holds {', '.join(use.left)} beside text")
        if parts.results:
            raise RowError("content_not_text", f"{where} holds a list with tool_result in it")
        value = _no_more(parts, where)
    if not isinstance(value, str):
        raise RowError(
            "content_not_text", f"{where} holds {type(value).__name__} instead of a string"
        )
    check_no_messages(value, where)
    return value


def dialogue(found: str, key: str, use: ColumnUse | None = None) -> Messages:
    """The turns of a "Human: ... Assistant: ..." text; one blank after the colon is not part of the
    turn."""
    marks = list(_SPEAKER.finditer(found))
    if not marks or found[: marks[0].start()].strip():
        start = found[:40].strip()
        raise RowError(
            "wrong_keys", f"{key} must begin with a Human: or Assistant: turn, found {start!r}"
        )
    ends = [mark.start() for mark in marks[1:]] + [len(found)]
    use = use or ColumnUse()
    return [
        spoken(_SPEAKERS[mark[1]], found[mark.end() : end], key, use)
        for mark, end in zip(marks, ends, strict=True)
    ]


def open_dialogue(found: str, use: ColumnUse | None = None) -> Messages:
    """A prompt text: the turns of "Human: ... Assistant:" without the open response, or those that
    HelpSteer2 marks, else one turn of the user."""
    if _TURN in found and (marked := _MARKED.split(found))[1:]:
        roles = ["user", *(_DIALOGUE[name.lower()] for name in marked[1::2])]
        return [
            {"role": role, "content": said}
            for role, said in zip(roles, marked[::2], strict=True)
            if said.strip()
        ]
    if found.lstrip().startswith("Human:") and "\n\nAssistant:" in found:
        turns = dialogue(found.lstrip(), "prompt", use)
        return (
            turns[:-1]
            if turns[-1]["role"] == "assistant" and not turn_text(turns[-1]).strip()
            else turns
        )
    return [{"role": "user", "content": found}]


def alternating(messages: Messages, first_role: str = "user") -> Messages:
    """``messages`` when user and assistant take turns after an optional system message,
    ``first_role`` first. Results of tools follow the response that calls them, and then the
    assistant or the user goes on."""
    if not messages:
        raise RowError("empty_conversation", "the list of messages is empty")
    first = int(first_role == "user" and messages[0]["role"] == "system")
    wanted = first_role
    before = ""
    for index, one in enumerate(messages[first:], first):
        role = one["role"]
        if role != wanted and not (role == "user" and before == "tool"):
            _check_tool(messages, index, wanted)
            before = "tool"
            wanted = "assistant"
            continue
        if role == "assistant":
            if not (one["content"].strip() or _says_more(one)):
                raise RowError("empty_answer", f"message {index} is empty")
            wanted = "tool" if "tool_calls" in one else "user"
        else:
            wanted = "assistant"
        before = role
    return messages


def _says_more(one: Message) -> bool:
    return "tool_calls" in one or "reasoning_content" in one


def _check_tool(messages: Messages, index: int, wanted: str) -> None:
    """Raise RowError unless message ``index`` is a result of a call before it."""
    role = messages[index]["role"]
    before = messages[index - 1] if index else {}
    if role == "tool" and ("tool_calls" in before or before.get("role") == "tool"):
        return
    if role == "tool":
        raise RowError(
            "roles_not_alternating",
            f"message {index} is from tool, expected {wanted}: no call of a tool before it",
            role,
        )
    expected = "tool, the result of its call" if wanted == "tool" else wanted
    raise RowError("roles_not_alternating", f"message {index} is from {role}, expected {expected}")


def turn_text(one: Message) -> str:
    """All that a message says: thought, text and calls."""
    if len(one) == 2:
        return one["content"]
    said = [one.get("reasoning_content", ""), one["content"]]
    if "tool_calls" in one:
        calls = [call["function"] for call in one["tool_calls"]]
        said.append(json.dumps(calls, ensure_ascii=False, sort_keys=True, default=str))
    return "\n".join(part for part in said if part)


def complete_rounds(messages: Messages) -> Messages:
    """Alternating messages that end with a response; a last question is left out."""
    messages = alternating(messages)
    end = len(messages)
    while end and messages[end - 1]["role"] in ("user", "tool"):
        end -= 1
    turns = messages if end == len(messages) else messages[:end]
    if not turns or turns[-1]["role"] != "assistant":
        raise RowError("no_assistant_turn", f"found only {', '.join(m['role'] for m in messages)}")
    return turns


def question(messages: Messages) -> Messages:
    """Alternating messages that end with the user, or with what a tool gave."""
    messages = alternating(messages)
    if messages[-1]["role"] not in ("user", "tool"):
        raise RowError("no_question", f"found {', '.join(m['role'] for m in messages)}")
    if messages[-1]["role"] == "user" and not messages[-1]["content"].strip():
        raise RowError(
            "no_question", f"message {len(messages) - 1}, the last of the user, is blank"
        )
    return messages


def without_response(messages: Messages) -> Messages:
    """:func:`question` of the messages, the last response left out if they end with one."""
    ends_with_answer = bool(messages) and messages[-1]["role"] == "assistant"
    return question(messages[:-1] if len(messages) > 1 and ends_with_answer else messages)


def continuation(messages: Messages, key: str) -> Messages:
    """The turns after a context: the assistant's first and last; what follows it is left out."""
    if not messages:
        raise RowError("empty_answer", f"{key} is empty")
    try:
        turns = alternating(messages, "assistant")
    except RowError as error:
        raise RowError(error.reason, f"{key}: {error.detail}") from error
    end = len(turns)
    while turns[end - 1]["role"] in ("user", "tool"):
        end -= 1
    return turns if end == len(turns) else turns[:end]


def common_context(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """``(context, chosen, rejected)`` of two whole conversations: what they share, up to a turn of
    the user or of a tool."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shared = next((k for k, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    while shared and chosen[shared - 1]["role"] not in ("user", "tool"):
        shared -= 1
    return chosen[:shared], chosen[shared:], rejected[shared:]
