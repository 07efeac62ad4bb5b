"""Between token ids and messages: what a response says, and the ids that stand between two
responses. Ids that were sampled stay as they are: they are read, never tokenized again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from coati.dataset.chat.conversation import Conversation
from coati.dataset.chat.response_format import response_format
from coati.dataset.chat.response_reader import PYTHON_TAG
from coati.environments.multi_turn import Message
from coati.models.generation.response_table import without_stop

UNREADABLE = "error: the call could not be read; write it in the form that calls of tools have"
_HARMONY_CALL = "to=functions."
Tools = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Said:
    """A response as a message. ``unreadable``: it holds what was meant as a call and is none."""

    message: Message
    unreadable: bool


class TurnTokens:
    """Reads and writes by ``conversation``'s template. ``stops``: the ids that end a response."""

    def __init__(self, conversation: Conversation, stops: Sequence[list[int]]) -> None:
        self.conversation = conversation
        self.format = response_format(conversation)
        self.stops = list(stops)

    def check_tools(self, tools: Tools) -> None:
        """Raises ValueError where the template cannot write ``tools``, or calls and results."""
        lacking = self.format.lacking(self.conversation.abilities)
        if tools and lacking:
            raise ValueError(
                f"the environment has tools, and the chat template cannot be used with them: "
                f"{lacking}; take one that can (--conversation_template_config)"
            )

    def first(self, messages: Sequence[Message], tools: Tools) -> tuple[list[int], str]:
        """Ids and text that the policy responds to at first. Raises RowError."""
        encoded = self.conversation.encode_prompt(list(messages), tools=list(tools) or None)
        return encoded.input_ids, encoded.text

    def read(self, ids: Sequence[int], before: str, tools: Tools) -> Said:
        """The response ``ids``, its stop sequence perhaps included, behind the text ``before``."""
        text = self.conversation.encoder.decode(without_stop(list(ids), self.stops))
        reply = self.format.read(text, before, tools)
        unreadable = bool(tools) and not reply.calls and self._tries_to_call(text, reply.content)
        return Said(reply.message(), unreadable)

    def _tries_to_call(self, text: str, content: str) -> bool:
        if self.format.channels:
            return _HARMONY_CALL in text
        calls = self.format.calls
        if calls is None:
            return False
        begin = content.lstrip()
        if not calls.anchored:
            return calls.opening.first in content
        opens = calls.begins.strip()[:1]
        return begin.startswith(PYTHON_TAG) or (opens in ("{", "[") and begin.startswith(opens))

    def unreadable_result(self, tools: Tools) -> Message:
        """What the policy is told of a call that cannot be read."""
        name = tools[0]["function"]["name"]
        return {"role": "tool", "name": name, "content": UNREADABLE}

    def between(
        self, ids: Sequence[int], said: Said, messages: Sequence[Message], tools: Tools
    ) -> tuple[list[int], str]:
        """Ids and text of ``messages`` behind the response ``ids``, up to where the next response
        begins, as the template writes them there. Raises RowError where it cannot."""
        turn = self._stand_in(said, tools)
        calls = "tool_calls" in turn
        written, following = self.conversation.encode_around(
            "?", turn, list(messages), list(tools) or None
        )
        text = self.conversation.encoder.decode(following)
        stop = self._stop_of(written)
        if stop and list(ids[-len(stop) :]) != stop and self._next_turn_begins_by_end(calls):
            following = [*stop, *following]  # the response ended by another token than that
        return following, text

    def _stand_in(self, said: Said, tools: Tools) -> Message:
        """A response of the same kind, around which the template writes the same: its text is not
        needed, and the policy's own may be none that the template would write."""
        calls = said.message.get("tool_calls")
        if said.unreadable:
            function = {"name": tools[0]["function"]["name"], "arguments": {}}
            calls = [{"type": "function", "function": function}]
        if calls:
            return {"role": "assistant", "content": "", "tool_calls": calls}
        return {"role": "assistant", "content": "!"}

    def _stop_of(self, ids: list[int]) -> list[int]:
        ending = [stop for stop in self.stops if ids[-len(stop) :] == stop]
        return max(ending, key=len, default=[])

    def _next_turn_begins_by_end(self, calls: bool) -> bool:
        """Whether the token that ends a response is the first of the turn after it."""
        if calls:
            return self.conversation.abilities.call_end_added
        return bool(self.conversation.end_added)
