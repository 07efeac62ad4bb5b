"""The format of a conversation template's responses, learned by rendering some."""

import re
from typing import TYPE_CHECKING, Any

from coati.dataset.chat import harmony
from coati.dataset.chat.call_format import FIRST, IDS, NAMES, NUMBER, VALUES, learn
from coati.dataset.chat.call_marks import common_beginning
from coati.dataset.chat.response_reader import PYTHON_TAG, ResponseFormat
from coati.dataset.rows.row_errors import RowError

if TYPE_CHECKING:
    from coati.dataset.chat.conversation import Conversation

_QUESTION = {"role": "user", "content": "Probe question"}
_ANSWER = "Probe answer"
_SCHEMAS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Probe description",
            "parameters": {"type": "object", "properties": {}, "required": []},
        },
    }
    for name in NAMES
]


def response_format(conversation: "Conversation") -> ResponseFormat:
    """How ``conversation``'s template writes thoughts, content and calls."""
    tags = conversation.abilities.forms.tags
    answer = _text(conversation, {"role": "assistant", "content": _ANSWER})
    channels = answer is not None and all(
        each in answer for each in (harmony.CHANNEL, harmony.MESSAGE)
    )
    calls = None
    lead = ""
    around = None
    if conversation.abilities.calls:
        writer = _Writer(conversation, tags)
        calls = learn(writer.write)
        call = writer.write("", [(FIRST, {})])
        lead = writer.lead
        if channels and call and FIRST in call:
            before, _, behind = call.partition(FIRST)
            around = before, behind.partition("{")[0]
    seen = "".join(harmony.TOKENS if channels else tags)
    inner = "" if calls is None else f"{seen}\n{calls.marks}\n{PYTHON_TAG}"
    return ResponseFormat(
        tags,
        calls,
        lead,
        channels,
        _tokens(conversation, seen),
        _tokens(conversation, inner),
        around,
    )


def _text(conversation: "Conversation", message: dict[str, Any] | None) -> str | None:
    """The dialogue with ``message``, or what generation is given; None where the template
    refuses."""
    try:
        if message is None:
            return conversation.render([_QUESTION], True, tools=_SCHEMAS)
        return conversation.render([_QUESTION, message], tools=_SCHEMAS)
    except RowError:
        return None


def _tokens(conversation: "Conversation", texts: str) -> frozenset[int]:
    """The control tokens that stand in ``texts``."""
    controls = conversation.encoder.controls.items()
    return frozenset(token for token, text in controls if text and text in texts)


class _Writer:
    """What the template writes for a response that calls tools. ``lead``: what stands before a
    call, which closes a thought that the generation prompt opened or is an empty one."""

    def __init__(self, conversation: "Conversation", tags: tuple[str, str]) -> None:
        self.conversation = conversation
        opening, closing = map(re.escape, tags)
        self._empty = re.compile(rf"\s*(?:{opening})?\s*{closing}\s*")
        self._tags = tags
        self._prompt = _text(conversation, None) or ""
        self.lead = ""

    def write(self, content: str, calls: Any) -> str | None:
        """See :data:`coati.dataset.chat.call_format.Write`."""
        message = {
            "role": "assistant",
            "content": content,
            "tool_calls": [
                {
                    "type": "function",
                    "id": IDS[number],
                    "function": {"name": name, "arguments": arguments},
                }
                for number, (name, arguments) in enumerate(calls)
            ],
        }
        text = _text(self.conversation, message)
        if text is None:
            return None
        same = self._prompt if text.startswith(self._prompt) else ""
        response = text[len(same or common_beginning(text, self._prompt)) :]
        opened = self._prompt.rstrip().endswith(self._tags[0])
        self.lead = ""
        if opened and not same:
            self.lead = f"\n{self._tags[1]}\n\n"
            response = response.lstrip()
        if empty := self._empty.match(response):
            self.lead = empty.group()
            response = response[empty.end() :]
        return self._without_end(response)

    def _without_end(self, response: str) -> str:
        last = max(response.rfind(each) for each in (*NAMES, *VALUES, str(NUMBER)))
        ends = (self.conversation.abilities.call_end, self.conversation.end_of_assistant)
        found = [place for end in ends if end and (place := response.find(end, last)) >= 0]
        return response[: min(found)] if found else response.rstrip()
