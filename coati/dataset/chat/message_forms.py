"""Messages in the form that a chat template reads: where it looks for thoughts, calls of tools and
their results. template_abilities.py finds the form out."""

import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
Messages = list[Message]
Tools = list[dict[str, Any]]

# What opens and closes a thought, by family; the first is what most write.
THOUGHT_TAGS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel>thought", "<channel|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<thought>", "</thought>"),
    ("<seed:think>", "</seed:think>"),
    ("<reasoning>", "</reasoning>"),
    ("◁think▷", "◁/think▷"),
)
_TAGS = re.compile("(" + "|".join(re.escape(tag) for pair in THOUGHT_TAGS for tag in pair) + ")")
# Fields of a message that some template reads a thought from, and the two other ways: a part of the
# content, and a text before it.
THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")
PARTS = "parts"
TEXT = "text"
RESULT_ROLES = ("tool", "observation", "ipython", "function")
_NINE = re.compile(r"[A-Za-z0-9]{9}")  # Mistral's ids of calls


@dataclass(frozen=True)
class MessageForms:
    """The form that one template reads.

    Attributes:
        thought: one of THOUGHT_FIELDS, PARTS or TEXT.
        tags: of thoughts, as the template names them.
        reads_text: a text before the content, in these tags, is written as a thought is, white
            space aside: what has such a text is given to the template as it stands.
        opened: what the generation prompt opens a thought with, "" where it opens none.
        arguments_as_text: calls with arguments as JSON text instead of objects.
        null_content: no content at all beside calls, instead of an empty text.
        call_ids: "" as the messages have them, "any" always some, "nine" always nine letters,
            "named" as Kimi's, ``functions.NAME:0``.
        result_role, result_name: of a tool's result; whether it must name its function.
        tools_name: the variable that holds the tools.
        calls_alone: calls are dropped beside a text, so a thought that would be one is left out.
    """

    thought: str = THOUGHT_FIELDS[0]
    tags: tuple[str, str] = THOUGHT_TAGS[0]
    reads_text: bool = False
    opened: str = ""
    arguments_as_text: bool = False
    null_content: bool = False
    call_ids: str = ""
    result_role: str = RESULT_ROLES[0]
    result_name: bool = False
    tools_name: str = "tools"
    calls_alone: bool = False

    def spelled(self, messages: Messages) -> Messages:
        """``messages`` of {role, content, reasoning_content, thought_marks, tool_calls, name,
        tool_call_id} in the template's form, without what is no template's (weights)."""
        calls = _Calls(self)
        return [
            message
            if len(message) == 2 and message["role"] != "tool"
            else self._spelled(message, calls)
            for message in messages
        ]

    def _spelled(self, message: Message, calls: "_Calls") -> Message:
        spelled: Message = {"role": message["role"], "content": message["content"]}
        if message["role"] == "tool":
            return calls.result(spelled, message)
        thought = message.get("reasoning_content")
        marks = message.get("thought_marks")
        alone = self.calls_alone and bool(message.get("tool_calls"))
        if marks and self._is_as_written(marks) and not alone:
            before, behind = marks
            opened = "" if self.tags[0] in before else self.opened
            spelled["content"] = f"{opened}{before}{thought or ''}{behind}{spelled['content']}"
        elif thought is not None and not (alone and self.thought == TEXT):
            self._add_thought(spelled, thought)
        if given := message.get("tool_calls"):
            spelled["tool_calls"] = list(calls.made(given))
            if self.null_content and not spelled["content"]:
                spelled["content"] = None
        return spelled

    def _is_as_written(self, marks: list[str]) -> bool:
        """Whether the template writes a text with these ``marks`` as it stands, or reads it."""
        closing = marks[1].strip()
        # A thought that was broken off has no end by which a template could tell it.
        known = closing == self.tags[1] or (not closing and self.thought == TEXT)
        return self.reads_text and known

    def _add_thought(self, spelled: Message, thought: str) -> None:
        content = spelled["content"]
        if self.thought == TEXT:
            opened, closed = self.tags
            spelled["content"] = f"{opened}\n{thought}\n{closed}\n\n{content}"
        elif self.thought == PARTS:
            parts = [{"type": "thinking", "thinking": thought}]
            spelled["content"] = parts + ([{"type": "text", "text": content}] if content else [])
        else:
            spelled[self.thought] = thought


class _Calls:
    """The calls of a conversation, whose results follow in their order."""

    def __init__(self, forms: MessageForms):
        self.forms = forms
        self._number = 0
        # (id in the row, name, id for the template) of calls without a result
        self._open: list[tuple[str | None, str, str | None]] = []

    def made(self, calls: list[Message]) -> Iterator[Message]:
        self._open = []
        for call in calls:
            function = dict(call["function"])
            if self.forms.arguments_as_text and not isinstance(function.get("arguments"), str):
                function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
            made = {**call, "function": function}
            given = call.get("id")
            if self.forms.call_ids == "named":
                made["id"] = f"functions.{function['name']}:{self._number}"
            elif self.forms.call_ids:
                made["id"] = self._id(given)
            self._number += 1
            self._open.append((given or made.get("id"), function["name"], made.get("id")))
            yield made

    def _id(self, given: str | None) -> str:
        if given is None:
            return f"call{self._number:05d}"
        if self.forms.call_ids != "nine" or _NINE.fullmatch(given):
            return given
        return f"{zlib.crc32(given.encode()) % 10**9:09d}"

    def result(self, spelled: Message, message: Message) -> Message:
        given = message.get("tool_call_id")
        matching = [one for one in self._open if given is not None and one[0] == given]
        call = (matching or self._open or [(given, "", given)])[0]
        if call in self._open:
            self._open.remove(call)
        spelled["role"] = self.forms.result_role
        name = message.get("name") or (call[1] if self.forms.result_name else "")
        if name:
            spelled["name"] = name
        if self.forms.call_ids:
            spelled["tool_call_id"] = call[2] or self._id(given)
        elif given is not None:
            spelled["tool_call_id"] = given
        return spelled


def with_cut_thoughts(messages: Messages, closing: str, cuts: str) -> Messages:
    """``messages`` with what a template cuts off a response at ``closing`` (Abilities.cuts) as its
    thought."""
    if not any(closing in one["content"] for one in messages if one["role"] == "assistant"):
        return messages
    return [
        _cut(one, closing, cuts)
        if one["role"] == "assistant" and closing in one["content"]
        else one
        for one in messages
    ]


def _cut(message: Message, closing: str, cuts: str) -> Message:
    content = message["content"]
    part = content.partition if cuts == "first" else content.rpartition
    before, _, answer = part(closing)
    opening, behind = message.get("thought_marks") or ("", "")
    thought = f"{message.get('reasoning_content', '')}{behind}{before}"
    made = {**message, "content": answer}
    if "reasoning_content" in message and not behind:  # in a field of its own, which is written
        return message
    made |= {"reasoning_content": thought, "thought_marks": [opening, closing]}
    if spans := message.get("spans"):
        offset = len(content) - len(answer)
        made["spans"] = [
            [max(0, first - offset), end - offset, weight]
            for first, end, weight in spans
            if end > offset
        ]
    return made


def texts_of(value: Any) -> Iterator[str]:
    """Every string in ``value`` at any depth, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from texts_of(key)
            yield from texts_of(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts_of(inner)


def written_texts(message: Message) -> Message:
    """What of ``message`` somebody wrote: neither its role nor the tags of its thought."""
    texts = {name: value for name, value in message.items() if name != "role"}
    if "thought_marks" in texts:
        texts["thought_marks"] = [_TAGS.sub("", mark) for mark in texts["thought_marks"]]
    return texts


def with_written_texts(message: Message, change: Any) -> Message:
    """A copy of ``message`` with ``change`` of each of its :func:`written_texts`."""

    def around_tags(mark: str) -> str:
        pieces = enumerate(_TAGS.split(mark))
        return "".join(piece if number % 2 else change(piece) for number, piece in pieces)

    texts = written_texts(message)
    marks = {"thought_marks": list(map(around_tags, message.get("thought_marks", ())))}
    changed = with_texts({k: v for k, v in texts.items() if k not in marks}, change)
    return {"role": message["role"], **changed, **(marks if texts.keys() & marks else {})}


def with_texts(value: Any, change: Any) -> Any:
    """A copy of ``value`` with ``change`` of each string in it, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {with_texts(key, change): with_texts(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [with_texts(inner, change) for inner in value]
    return value
