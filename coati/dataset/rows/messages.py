"""Lists of messages as people write them: spellings of roles and contents, turns, and
"Human:/Assistant:" texts.

Everything here takes decoded JSON and gives messages of {role, content} with the roles system,
user, assistant, or raises RowError naming the message that is wrong. Nothing is changed in place.
"""

import re
from typing import Any

from coati.dataset.rows.row_errors import OTHER_ROLES, ROLES, RowError

Messages = list[dict[str, str]]
# The turns of Anthropic's hh-rlhf texts: each begins with a blank line, the first perhaps without.
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def is_message_list(row: Any) -> bool:
    return (
        isinstance(row, list)
        and bool(row)
        and all(isinstance(m, dict) and ("role" in m or "from" in m) for m in row)
    )


def message_list(found: Any, key: str) -> Messages:
    """The messages under ``key``, whose elements have ``role`` or ``from`` and ``content`` or
    ``value``."""
    if not isinstance(found, list):
        raise RowError(
            "wrong_keys", f"{key} must be a list of messages, found {type(found).__name__}"
        )
    return [message(one, f"message {index}") for index, one in enumerate(found)]


def message(found: Any, where: str) -> dict[str, str]:
    """One message, ``where`` being its name in what an error says."""
    if not isinstance(found, dict):
        raise RowError("wrong_keys", f"{where} must be an object, found {type(found).__name__}")
    role = found.get("role") if found.get("from") is None else found["from"]
    content = found.get("value") if found.get("content") is None else found["content"]
    known = ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None or not content:
        _refuse_tools(found, role, content, where)
    if role is None or content is None:
        lacking = "from (or role)" if role is None else "content (or value)"
        raise RowError(
            "wrong_keys", f"{where} lacks {lacking}, found {', '.join(map(str, found)) or 'no key'}"
        )
    if known is None:
        raise RowError(
            "unknown_role", f"{where} is from {role!r}; known roles: {', '.join(ROLES)}", str(role)
        )
    return {"role": known, "content": text(content, where)}


def _refuse_tools(found: dict, role: Any, content: Any, where: str) -> None:
    if isinstance(role, str) and role.lower() in OTHER_ROLES:
        said = f"{where} is from {role!r}; train on dialogues of user and assistant"
        raise RowError("unsupported_role", said, role.lower())
    for calls in ("tool_calls", "function_call"):
        if found.get(calls) and not content:
            raise RowError("unsupported_role", f"{where} has {calls} in place of text")


def text(value: Any, where: str) -> str:
    """A string, or OpenAI's list of ``{"type": "text", "text": ...}`` parts joined."""
    if isinstance(value, list) and value:
        return "".join(_part(part, where) for part in value)
    if not isinstance(value, str):
        raise RowError(
            "content_not_text", f"{where} holds {type(value).__name__} instead of a string"
        )
    return value


def _part(part: Any, where: str) -> str:
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return part["text"]
    kind = (
        part.get("type", "an object without text")
        if isinstance(part, dict)
        else type(part).__name__
    )
    raise RowError(
        "content_not_text", f"{where} holds a list with {kind} in it; only text parts can be read"
    )


def dialogue(found: str, key: str) -> Messages:
    """The turns of a "Human: ... Assistant: ..." text; one blank after the colon is not part of the
    turn."""
    marks = list(_SPEAKER.finditer(found))
    if not marks or found[: marks[0].start()].strip():
        start = found[:40].strip()
        raise RowError(
            "wrong_keys", f"{key} must begin with a Human: or Assistant: turn, found {start!r}"
        )
    ends = [mark.start() for mark in marks[1:]] + [len(found)]
    return [
        {"role": _SPEAKERS[mark[1]], "content": found[mark.end() : end]}
        for mark, end in zip(marks, ends, strict=True)
    ]


def open_dialogue(found: str) -> Messages:
    """A prompt text: the turns of "Human: ... Assistant:" without the open response, else one turn
    of the user."""
    if found.lstrip().startswith("Human:") and "\n\nAssistant:" in found:
        turns = dialogue(found.lstrip(), "prompt")
        return (
            turns[:-1]
            if turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip()
            else turns
        )
    return [{"role": "user", "content": found}]


def alternating(messages: Messages, first_role: str = "user") -> Messages:
    """``messages`` when user and assistant take turns after an optional system message,
    ``first_role`` first."""
    if not messages:
        raise RowError("empty_conversation", "the list of messages is empty")
    first = int(first_role == "user" and messages[0]["role"] == "system")
    turns = ("user", "assistant") if first_role == "user" else ("assistant", "user")
    for index, one in enumerate(messages[first:]):
        wanted = turns[index % 2]
        if one["role"] != wanted:
            raise RowError(
                "roles_not_alternating",
                f"message {index + first} is from {one['role']}, expected {wanted}",
            )
        if wanted == "assistant" and not one["content"].strip():
            raise RowError("empty_answer", f"message {index + first} is empty")
    return messages


def complete_rounds(messages: Messages) -> Messages:
    """Alternating messages that end with a response; a last question is left out."""
    messages = alternating(messages)
    turns = messages[:-1] if messages[-1]["role"] == "user" else messages
    if not turns or turns[-1]["role"] != "assistant":
        raise RowError("no_assistant_turn", f"found only {', '.join(m['role'] for m in messages)}")
    return turns


def question(messages: Messages) -> Messages:
    """Alternating messages that end with the user."""
    messages = alternating(messages)
    if messages[-1]["role"] != "user":
        raise RowError("no_question", f"found {', '.join(m['role'] for m in messages)}")
    if not messages[-1]["content"].strip():
        raise RowError(
            "no_question", f"message {len(messages) - 1}, the last of the user, is blank"
        )
    return messages


def without_response(messages: Messages) -> Messages:
    """:func:`question` of the messages, the last response left out if they end with one."""
    ends_with_answer = bool(messages) and messages[-1]["role"] == "assistant"
    return question(messages[:-1] if len(messages) > 1 and ends_with_answer else messages)


def continuation(messages: Messages, key: str) -> Messages:
    """The turns after a context: the assistant's first and last; a last turn of the user is left
    out."""
    if not messages:
        raise RowError("empty_answer", f"{key} is empty")
    try:
        turns = alternating(messages, "assistant")
    except RowError as error:
        raise RowError(error.reason, f"{key}: {error.detail}") from error
    return turns[:-1] if turns[-1]["role"] == "user" else turns


def common_context(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """``(context, chosen, rejected)`` of two whole conversations: what they share, up to a turn of
    the user."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shared = next((k for k, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    while shared and chosen[shared - 1]["role"] != "user":
        shared -= 1
    return chosen[:shared], chosen[shared:], rejected[shared:]
