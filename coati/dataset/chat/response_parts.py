"""What a response consists of: thoughts, content and calls of tools."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from coati.dataset.chat.call_bodies import Call

THOUGHT = "thought"
CONTENT = "content"
CALL = "call"


class Part(NamedTuple):
    """A piece of a thought or of the content, or a whole call."""

    kind: str
    text: str = ""
    call: Call | None = None


def joined(parts: Iterable[Part]) -> list[Part]:
    """``parts`` without empty texts, neighbors of one kind as one."""
    found: list[Part] = []
    for part in parts:
        if part.kind != CALL and not part.text:
            continue
        if found and part.kind != CALL and found[-1].kind == part.kind:
            found[-1] = Part(part.kind, found[-1].text + part.text)
        else:
            found.append(part)
    return found


@dataclass
class Reply:
    """A whole response. ``marks``: what its text has before the thought and between that and the
    content, None where they are unknown or there is no thought."""

    content: str = ""
    thought: str = ""
    calls: list[Call] = field(default_factory=list)
    marks: list[str] | None = None

    def add(self, parts: Sequence[Part]) -> "Reply":
        """With ``parts`` behind it."""
        for part in parts:
            if part.kind == THOUGHT:
                self.thought += part.text
            elif part.kind == CONTENT:
                self.content += part.text
            elif part.call is not None:
                self.calls.append(part.call)
        return self

    def message(self) -> dict[str, Any]:
        """As a message of a conversation."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.thought:
            message["reasoning_content"] = self.thought
        if self.marks is not None:
            message["thought_marks"] = self.marks
        if self.calls:
            message["tool_calls"] = [
                {
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                    **({"id": call.id} if call.id else {}),
                }
                for call in self.calls
            ]
        return message
