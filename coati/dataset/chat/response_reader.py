"""A response read back by the template that writes such responses: its thought, its content and its
calls of tools, whole or as it comes. What is no call that can be read is content."""

import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from coati.dataset.chat import harmony
from coati.dataset.chat.call_bodies import (
    Call,
    Incomplete,
    Types,
    Unreadable,
    argument_types,
)
from coati.dataset.chat.call_format import CallFormat
from coati.dataset.chat.call_marks import held_back, skip_space
from coati.dataset.chat.response_parts import CALL, CONTENT, THOUGHT, Part, Reply, joined
from coati.dataset.chat.template_abilities import Abilities

PYTHON_TAG = "<|python_tag|>"  # Llama 3.x may write it before a call
# What a state reads of the text; whether it has made way.
Reading = Generator[Part, None, bool]
_SEPARATORS = re.compile(r"[\s,;]*")
_CLOSERS = frozenset("}])>")


class Reader(Protocol):
    """``first_call_end``: characters up to the end of the first call, None before it. ``marks``:
    what was written before a thought and between it and the content, None where there was no
    thought among texts."""

    first_call_end: int | None
    marks: list[str] | None

    def push(self, piece: str, final: bool = False) -> list[Part]:
        """The parts that are certain after ``piece``; ``final``: nothing comes after it."""


@dataclass(frozen=True)
class ResponseFormat:
    """How a template writes responses. ``tags`` of thoughts; ``calls`` None: it writes none;
    ``lead``: what it writes before a call without a thought; ``channels``: in harmony's channels;
    ``around_name``: what is written there before and behind the name of a called function;
    ``shown``, ``shown_of_calls``: control tokens that a reader needs to see, with calls and
    without."""

    tags: tuple[str, str]
    calls: CallFormat | None = None
    lead: str = ""
    channels: bool = False
    shown: frozenset[int] = frozenset()
    shown_of_calls: frozenset[int] = frozenset()
    around_name: tuple[str, str] | None = None

    def reader(
        self, prompt: str = "", tools: Sequence[Mapping[str, Any]] = (), begun: bool = False
    ) -> Reader:
        """A reader of the response behind ``prompt``, the text that the model was given. Without
        ``tools`` calls are content. ``begun``: the prompt holds the first words of the content."""
        if self.channels:
            return harmony.HarmonyReader(prompt, bool(tools))
        opened = not begun and prompt.rstrip().endswith(self.tags[0])
        calls = self.calls if tools else None
        return TaggedReader(self.tags, calls, argument_types(tools), opened, begun)

    def lacking(self, abilities: Abilities) -> str:
        """What keeps tools from being used with a template of these ``abilities``; "" where nothing
        does."""
        if abilities.lacking:
            return f"it writes no {abilities.lacking.replace(', ', ' and no ')}"
        if self.calls is None and not self.channels:
            return "it writes calls of tools so that they cannot be told from text"
        return ""

    def forced(self, name: str | None = None) -> str | None:
        """The beginning of a response that calls the function ``name``, or any; None where calls
        cannot be begun."""
        if self.around_name is not None:
            before, behind = self.around_name
            return before if name is None else f"{before}{name}{behind}"
        return None if self.calls is None else self.lead + self.calls.forced(name)

    def read(self, text: str, prompt: str = "", tools: Sequence[Mapping[str, Any]] = ()) -> Reply:
        """A whole response."""
        reader = self.reader(prompt, tools)
        reply = Reply().add(reader.push(text, final=True))
        reply.marks = reader.marks
        return reply


class TaggedReader:
    """Thoughts between ``tags`` at the beginning, then content and calls in any order. ``opened``:
    the prompt has opened a thought; ``begun``: it holds words of the content."""

    def __init__(
        self,
        tags: tuple[str, str],
        calls: CallFormat | None,
        types: Types,
        opened: bool = False,
        begun: bool = False,
    ) -> None:
        self.tags = tags
        self.calls = calls
        self.types = types
        self.first_call_end: int | None = None
        self.marks: list[str] | None = ["", ""] if opened else None
        self._text = ""
        self._taken = 0
        self._state: Callable[[bool], Reading] = self._start
        if opened or begun:
            self._state = self._in_thought if opened else self._content
        self._lead = opened  # white space at the beginning of what follows is the template's
        self._spoken = begun  # whether content has come, after which anchored calls are text
        self._again = False
        self._body = 0  # where the body of a call begins
        self._closer = False  # whether a call may have been closed since it was last looked at

    def push(self, piece: str, final: bool = False) -> list[Part]:
        """See :class:`Reader`."""
        self._text += piece
        self._closer = self._closer or not _CLOSERS.isdisjoint(piece)
        return joined(self._parts(final))

    def _parts(self, final: bool) -> Iterator[Part]:
        # Each state takes from the text what it can, and says whether it has made way.
        while (yield from self._state(final)):
            pass

    def _take(self, size: int) -> str:
        taken = self._text[:size]
        self._text = self._text[size:]
        self._taken += size
        return taken

    def _mark(self, place: int, size: int) -> None:
        """Take what stands before or behind the thought."""
        taken = self._take(size)
        if self.marks is not None:
            self.marks[place] += taken

    def _start(self, final: bool) -> Reading:
        yield from ()
        opening = self.tags[0]
        begin = skip_space(self._text, 0)
        if self._text.startswith(opening, begin):
            self.marks = [self._take(begin + len(opening)), ""]
            self._lead = True
            self._state = self._in_thought
            return True
        if not final and opening.startswith(self._text[begin:]):
            return False
        self._state = self._content
        return True

    def _in_thought(self, final: bool) -> Reading:
        opening, closing = self.tags
        if self._lead:
            self._mark(0, skip_space(self._text, 0))
            if self._text.startswith(opening):  # behind a prompt that has opened the thought
                self._mark(0, len(opening))
                return True
            if not self._text or (not final and opening.startswith(self._text)):
                return False
            self._lead = False
        end = self._text.find(closing)
        if end < 0:
            size = len(self._text.rstrip()) if final else held_back(self._text, 0, [closing])
            yield Part(THOUGHT, self._take(size))
            return False
        said = len(self._text[:end].rstrip())
        yield Part(THOUGHT, self._take(said))
        self._mark(1, end - said + len(closing))
        self._lead = True
        self._state = self._content
        return True

    def _content(self, final: bool) -> Reading:
        if self._lead:
            space = skip_space(self._text, 0)
            if self.first_call_end is None:
                self._mark(1, space)
            else:
                self._take(space)
            if not self._text:
                return False
            self._lead = False
        if self.calls is None:
            yield Part(CONTENT, self._take(len(self._text)))
            return False
        if not self.calls.anchored:
            return (yield from self._up_to_mark(final, self.calls))
        if not self._spoken:
            return (yield from self._anchored(final))
        yield Part(CONTENT, self._take(len(self._text)))
        return False

    def _up_to_mark(self, final: bool, calls: CallFormat) -> Reading:
        first = calls.opening.first
        begin = self._text.find(first)
        while begin >= 0:
            found = calls.opening.match(self._text, begin)
            if found is not None and found.partial and not final:
                yield Part(CONTENT, self._take(len(self._text[:begin].rstrip())))
                return False
            if found is not None and not found.partial:
                said = len(self._text[:begin].rstrip())
                yield Part(CONTENT, self._take(said))
                self._call_at(found.end - said, again=False)
                return True
            begin = self._text.find(first, begin + 1)
        size = len(self._text) if final else held_back(self._text, 0, [first])
        yield Part(CONTENT, self._take(size))
        return False

    def _anchored(self, final: bool) -> Reading:
        """Calls that no mark tells: of known functions, where the content begins."""
        begin = skip_space(self._text, 0)
        if not final and PYTHON_TAG.startswith(self._text[begin:]):
            return False
        if self._text.startswith(PYTHON_TAG, begin):
            begin += len(PYTHON_TAG)
        try:
            calls, end = self._read(begin, final, known=True)
        except Incomplete:
            return False
        except Unreadable:
            self._spoken = True
            return True
        yield from self._called(calls, end)
        return True

    def _call_at(self, body: int, again: bool) -> None:
        """The body of a call may begin at ``body``; ``again``: behind another call."""
        self._body = body
        self._again = again
        self._closer = True
        self._state = self._in_call

    def _in_call(self, final: bool) -> Reading:
        if not (self._closer or final):
            return False
        self._closer = False
        try:
            calls, end = self._read(self._body, final)
        except Incomplete:
            return False
        except Unreadable:
            if self._again:
                self._end_call()
                self._lead = True
            elif self.calls is not None:
                mark = skip_space(self._text, 0) + len(self.calls.opening.first)
                yield Part(CONTENT, self._take(mark))
            self._state = self._content
            return True
        yield from self._called(calls, end)
        return True

    def _read(self, start: int, final: bool, known: bool = False) -> tuple[list[Call], int]:
        """Raises Incomplete, Unreadable, also for a function that is not ``known``."""
        if self.calls is None:
            raise Unreadable
        calls, end = self.calls.body.read(self._text, start, final, self.types)
        if known and any(call.name not in self.types for call in calls):
            raise Unreadable
        return calls, end

    def _called(self, calls: Sequence[Call], end: int) -> Iterator[Part]:
        self._take(end)
        if self.first_call_end is None:
            self.first_call_end = self._taken
        for call in calls:
            yield Part(CALL, call=call)
        self._spoken = True
        self._state = self._after_call

    def _after_call(self, final: bool) -> Reading:
        if self.calls is None:
            return False
        if self.calls.between is not None and self.calls.between:
            found = self.calls.between.match(self._text, 0)
            if found is not None and not found.partial:
                self._call_at(found.end, again=True)
                return True
            if found is not None and not final:
                return False
        elif self.calls.anchored or self.calls.between is not None:
            try:
                start = _SEPARATORS.match(self._text, 0)
                begin = start.end() if start else 0
                calls, end = self._read(begin, final, known=self.calls.anchored)
            except Incomplete:
                return False
            except Unreadable:
                pass
            else:
                yield from self._called(calls, end)
                return True
        found = self.calls.closing.match(self._text, 0)
        if found is not None and found.partial and not final:
            return False
        if found is not None and (not found.partial or found.parts or not self._text.strip()):
            self._take(found.end)
        else:
            self._end_call()
        self._lead = True
        self._state = self._content
        return True

    def _end_call(self) -> None:
        """Pass over what closes one call of several."""
        found = self.calls.own_closing.match(self._text, 0) if self.calls else None
        if found is not None and not found.partial:
            self._take(found.end)
