"""Responses in harmony's channels (gpt-oss): messages with a header each, whose channel says
whether a text is a thought or for the user, and whose recipient says which function is called."""

import re
from collections.abc import Iterator

from coati.dataset.chat.call_bodies import Call, Unreadable, from_json
from coati.dataset.chat.call_marks import held_back
from coati.dataset.chat.response_parts import CALL, CONTENT, THOUGHT, Part, joined

START = "<|start|>"
CHANNEL = "<|channel|>"
MESSAGE = "<|message|>"
ENDS = ("<|end|>", "<|return|>", "<|call|>", START)
TOKENS = (*ENDS, CHANNEL, MESSAGE, "<|constrain|>")
_ANY_END = re.compile("|".join(map(re.escape, ENDS)))
_RECIPIENT = re.compile(r"\bto=([\w./-]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_FUNCTIONS = "functions."


class HarmonyReader:
    """Reads one response behind ``prompt``, which holds the beginning of its first header.
    ``with_calls``: whether calls are read, else they are text."""

    def __init__(self, prompt: str, with_calls: bool) -> None:
        self.with_calls = with_calls
        self.first_call_end: int | None = None  # characters up to it
        self._header = prompt.rpartition(START)[2] if START in prompt else ""
        self._in_body = MESSAGE in self._header
        self._own_header = False  # whether it ends in the response
        self.marks: list[str] | None = None
        self._text = ""
        self._taken = 0
        self._bodies = int(self._in_body)
        self._thought = False  # whether there was one

    def push(self, piece: str, final: bool = False) -> list[Part]:
        """The parts that are certain after ``piece``; ``final``: nothing comes after it."""
        self._text += piece
        return joined(self._parts(final))

    def _take(self, size: int) -> str:
        taken = self._text[:size]
        self._text = self._text[size:]
        self._taken += size
        return taken

    def _parts(self, final: bool) -> Iterator[Part]:
        while True:
            if not self._in_body:
                header, mark, _ = self._text.partition(MESSAGE)
                if not mark:
                    if final and not self._bodies and CHANNEL not in header:
                        yield Part(CONTENT, self._take(len(header)))  # a text without a header
                    return
                self._own_header = True
                self._header += self._take(len(header) + len(mark))
                self._in_body = True
                self._bodies += 1
                if self._kind == THOUGHT and self._thought:
                    yield Part(THOUGHT, "\n")
            end = _ANY_END.search(self._text)
            if end is None:
                yield from self._unfinished(final)
                return
            yield from self._finished(self._take(end.start()), len(end.group()))
            self._take(len(end.group()))
            self._header = ""
            self._in_body = False

    @property
    def _recipient(self) -> str | None:
        found = _RECIPIENT.search(self._header)
        return found.group(1) if found and self.with_calls else None

    @property
    def _kind(self) -> str:
        found = _CHANNEL.search(self._header)
        return THOUGHT if found and found.group(1) == "analysis" else CONTENT

    def _unfinished(self, final: bool) -> Iterator[Part]:
        if self._recipient is not None:
            if final:
                yield from self._finished(self._take(len(self._text)), 0)
            return
        size = len(self._text) if final else held_back(self._text, 0, ENDS)
        yield self._said(self._take(size))

    def _finished(self, body: str, mark: int) -> Iterator[Part]:
        recipient = self._recipient
        if recipient is None:
            yield self._said(body)
            return
        try:
            arguments = from_json(body)
            if not isinstance(arguments, dict):
                raise Unreadable
        except Unreadable:
            header = self._header.removeprefix(START).removeprefix("assistant").lstrip()
            yield Part(CONTENT, (header if self._own_header else "") + body)
            return
        self.first_call_end = self.first_call_end or self._taken + mark
        yield Part(CALL, call=Call(recipient.removeprefix(_FUNCTIONS), arguments))

    def _said(self, text: str) -> Part:
        self._thought = self._thought or (self._kind == THOUGHT and bool(text))
        return Part(self._kind, text)
