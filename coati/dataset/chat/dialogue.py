"""The messages of one row under a template: their text, and where each turn of the assistant begins
and ends in it.

A turn spans from the end of the text of the messages before it, generation prompt included, to just
past the first end marker after it. Where the template writes the messages before a turn otherwise
once it has been given (a system message before the last question), the turn's text is put behind
what generation is given.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

from coati.dataset.chat.message_forms import (
    Message,
    Messages,
    Tools,
    texts_of,
    with_cut_thoughts,
)
from coati.dataset.chat.schema_parts import dropped_notes
from coati.dataset.chat.tool_checks import check_tools
from coati.dataset.chat.word_cache import Span
from coati.dataset.rows.row_errors import RowError

if TYPE_CHECKING:
    from coati.dataset.chat.conversation import Conversation

# One of these stands in a message where its place in the text is looked for.
MARKS = range(0x10FFFD, 0x100000, -1)
# What a thought, blank or not, makes a message have.
THINKING = frozenset(("reasoning_content", "thought_marks"))
# What is counted of rows, by names that the report knows.
DROPPED = "thoughts dropped by the template"
ADDED = "thoughts added to the template's text"
LEFT_OUT = "thoughts left out (--thoughts)"
EMPTY = "empty thoughts of the template"
SPEECH_DROPPED = "texts beside calls dropped by the template"
SYSTEM_DROPPED = "system messages dropped by the template"
UNUSED_WEIGHT = "weights of turns that are not learned"
ONLY_SFT = "weights that only --type sft reads"


class Dialogue:
    """The messages and tools of one row, their markers hidden and their thoughts as the options
    want them.

    Attributes:
        messages: as they came, in the library's form; ``given`` in the template's.
        key: see :meth:`ChatEncoder.hide`.
        turns: the indices of the assistant's messages.
        notes: what is to be counted of the row.

    ``begun``: the last message is the beginning of a response.
    """

    def __init__(
        self,
        template: "Conversation",
        messages: Messages,
        tools: Tools | None = None,
        begun: bool = False,
    ) -> None:
        messages = template.with_system(messages)
        closing = template.abilities.forms.tags[1]
        # A tag that is a control token is hidden in contents.
        if template.abilities.cuts and closing not in template.encoder.markers:
            whole = len(messages) - begun
            cut = with_cut_thoughts(messages[:whole], closing, template.abilities.cuts)
            messages = [*cut, *messages[whole:]]
        self.template = template
        self.notes: set[str] = set()
        self.turns: list[int] = []
        self.plain = not tools
        for k, message in enumerate(messages):
            role = message["role"]
            if role == "assistant":
                self.turns.append(k)
            if len(message) != 2 or role == "tool":
                self.plain = False
        self.tools: Tools | None = None
        self._variables: dict[str, Any] | None = None
        if self.plain:
            self.messages, self.key = template.encoder.hide_contents(messages)
            self.given = self.messages
        else:
            self._take(messages, tools)

    def _take(self, messages: Messages, tools: Tools | None) -> None:
        """Messages that are more than role and text."""
        template = self.template
        check_tools(template, messages, tools)
        if not template.abilities.speaks_and_calls and any(
            one.get("tool_calls") and one["content"].strip() for one in messages
        ):
            self.notes.add(SPEECH_DROPPED)
        messages = self._with_wanted_thoughts(messages)
        self.messages, self.tools, self.key = template.encoder.hide(messages, tools or None)
        forms = template.abilities.forms
        self.given = forms.spelled(self.messages)
        if self.tools:
            self._variables = {forms.tools_name: self.tools}
            self.notes |= dropped_notes(template.abilities.lost_parts, tools or [])

    def _with_wanted_thoughts(self, messages: Messages) -> Messages:
        option = self.template.options.thoughts
        if option not in ("drop", "last"):
            return messages
        thinking = [k for k, message in enumerate(messages) if not THINKING.isdisjoint(message)]
        last = max((k for k, one in enumerate(messages) if one["role"] == "assistant"), default=-1)
        left_out = {k for k in thinking if option == "drop" or k != last}
        if not left_out:
            return messages
        if any("reasoning_content" in messages[k] for k in left_out):
            self.notes.add(LEFT_OUT)
        return [
            _without(message, *THINKING) if k in left_out else message
            for k, message in enumerate(messages)
        ]

    @cached_property
    def mark(self) -> str:
        """A character that the row does not hold."""
        texts = "".join(texts_of([self.messages, self.tools]))
        return next(mark for mark in map(chr, MARKS) if mark not in texts)

    # texts

    def prompt(self, end: int) -> str:
        """What generation is given after the first ``end`` messages."""
        return self._prompt(self.given[:end])

    def _prompt(self, given: Messages) -> str:
        return self.template.render_given(given, True, self._variables) + self.template.header

    def text(self, end: int | None = None) -> str:
        """The first ``end`` messages (None: all), the end marker of a last response included."""
        given = self.given[:end]
        text = self._finished(given)
        if given and len(given) - 1 in self.turns:
            last = self.messages[len(given) - 1]
            text += self.template.added_end(bool(last.get("tool_calls")))
        return text

    def _finished(self, given: Messages) -> str:
        return self.template.render_given(given, False, self._variables)

    def alone(self, k: int) -> tuple[str, Span]:
        """``(text, span)`` of the row that ends with turn ``k``, as the model has it when it
        responds. Raises RowError."""
        text = self.text(k + 1)
        try:
            text, span = text, self.span(text, k)
        except RowError as error:
            if error.reason != "template_rewrites":
                raise
            text, span = self._composed(text, k)
        if self._lacks_thought(text, span, k) and self.template.options.keeps_thoughts:
            text, start = self._with_thought(k)
            span = start, self._ended(text, start, k)
            self.notes.add(ADDED)
        return text, span

    def _composed(self, text: str, k: int) -> tuple[str, Span]:
        """The prompt of turn ``k`` and behind it what the template writes for the turn, where it
        writes the turns before it otherwise."""
        if k == 0 or self.template.starts_at_content:
            raise _rewritten(k)
        before = [*self.given[: k - 1], {**self.given[k - 1], "content": self.mark}]
        prompt = self._prompt(before).rpartition(self.mark)[2]
        whole = self._finished([*before, self.given[k]]).rpartition(self.mark)[2]
        if not whole.startswith(prompt):
            raise _rewritten(k)
        start = self.prompt(k)
        calls = bool(self.messages[k].get("tool_calls"))
        text = start + whole[len(prompt) :] + self.template.added_end(calls)
        end = self._ended(text, len(start), k)
        return text, (self._after_empty_thought(text, len(start), k), end)

    def _ended(self, text: str, start: int, k: int) -> int:
        """The end of turn ``k``, which begins at ``start`` and with which ``text`` ends."""
        marker = self._marker(k)
        calls = bool(self.messages[k].get("tool_calls"))
        place = text.rfind(marker, start) if calls else text.find(marker, start)
        if place < 0:
            raise _unended(k, marker)
        return place + len(marker)

    # thoughts

    def thought(self, k: int) -> str | None:
        """The thought of turn ``k`` that is to be learned."""
        return self.messages[k].get("reasoning_content")

    def _lacks_thought(self, text: str, span: Span, k: int) -> bool:
        thought = None if self.plain else self.thought(k)
        return thought is not None and thought.strip() not in text[slice(*span)]

    def count(self, text: str, span: Span, k: int) -> None:
        """Note what of turn ``k`` is not in its ``span`` of ``text``. Raises RowError for a lost
        thought where the options refuse that."""
        if self.plain:
            return
        if self._lacks_thought(text, span, k):
            if self.template.options.thoughts == "refuse":
                raise RowError("thought_dropped", f"that of message {k}")
            self.notes.add(DROPPED)
        turn = self.messages[k]
        said = text[slice(*span)]
        names = [call["function"]["name"] for call in turn.get("tool_calls") or ()]
        for name in names:
            if said.count(name) < names.count(name):
                raise RowError(
                    "tools_unsupported",
                    f"it leaves out a call of {name} in message {k}"
                    + (", which has a text beside it" if turn["content"] else ""),
                )
        if turn.get("tool_calls") and turn["content"].strip() not in said:
            self.notes.add(SPEECH_DROPPED)

    def count_system(self, text: str) -> None:
        """Note a system message that is not in ``text``."""
        first = self.messages[0]
        if first["role"] == "system" and first["content"].strip() not in text:
            self.notes.add(SYSTEM_DROPPED)

    def lost_thoughts(self, text: str, spans: Sequence[tuple[int, Span]]) -> bool:
        """Whether a thought is not in its span of ``text`` that a row of its own would hold."""
        abilities = self.template.abilities
        if self.plain or (
            abilities.thoughts == "none" and not self.template.options.keeps_thoughts
        ):
            return False
        return any(self._lacks_thought(text, span, k) for k, span in spans)

    def _with_thought(self, k: int) -> tuple[str, int]:
        """The text up to turn ``k``, with the thought before its content, in the template's own
        tags, and where the turn begins. Raises RowError where the content cannot be found."""
        template = self.template
        abilities = template.abilities
        turn = self.messages[k]
        plain = {
            **_without(turn, *THINKING),
            "content": self.mark + turn["content"].lstrip("\n"),
        }
        forms = abilities.forms
        given = forms.spelled([*self.messages[:k], plain])
        text = self._finished(given) + template.added_end(bool(turn.get("tool_calls")))
        before, mark, after = text.partition(self.mark)
        if not mark:
            raise RowError("thought_dropped", f"that of message {k}, whose text is dropped too")
        opening, closing = forms.tags
        if abilities.opened:
            before = self.prompt(k)
            opening = ""
        else:
            before = before.removesuffix(abilities.empty).removesuffix(closing)
            opening += "\n"
        text = f"{before}{opening}{turn['reasoning_content']}\n{closing}\n\n{after}"
        return text, len(before)

    def _is_bare(self, k: int) -> bool:
        """Whether turn ``k`` has no thought."""
        turn = self.messages[k]
        closing = self.template.abilities.forms.tags[1]
        return "reasoning_content" not in turn and closing not in turn["content"]

    def _blank_thought(self, k: int) -> str:
        """The thought of turn ``k``, where that is blank; "" where it is not, or there is none."""
        turn = self.messages[k]
        return "" if "reasoning_content" in turn else "".join(turn.get("thought_marks", ()))

    def _after_empty_thought(self, text: str, start: int, k: int) -> int:
        """``start``, or the place behind the empty thought that the template writes there."""
        empty = self.template.abilities.empty
        if not empty or not text.startswith(empty, start) or not self._is_bare(k):
            return start
        self.notes.add(EMPTY)
        return start + len(empty) if self.template.options.empty_thoughts == "mask" else start

    # spans

    def span(self, text: str, k: int) -> Span:
        """Characters of assistant turn ``k`` in ``text``, its end marker included. Raises
        RowError."""
        start = self._start(text, k)
        return start, self._end(text, start, k)

    def span_before(self, text: str, k: int) -> Span:
        """:meth:`span` of turn ``k``, which another message follows, also where the template writes
        the turn otherwise than where it is the last. Raises RowError."""
        try:
            return self.span(text, k)
        except RowError as error:
            if error.reason not in ("template_rewrites", "no_end_marker"):
                raise
        marker = self._marker(k)
        before = len(commonprefix([self._before_content(k + 1), text]))
        if (end := text.rfind(marker, 0, before)) >= 0:
            return end, end + len(marker)
        # Another marker ends a turn that is not the last.
        said = len(commonprefix([self._before_content(k), text])) + len(self.messages[k]["content"])
        ends = [
            (place, place + len(each))
            for each in self.template.encoder.markers
            if (place := text.find(each, said, before)) >= 0
        ]
        if not ends or self.messages[k].get("tool_calls"):
            raise _unended(k, marker)
        return min(ends)

    def _start(self, text: str, k: int) -> int:
        template = self.template
        at_content = template.starts_at_content
        if not (at_content and self._is_bare(k)):
            prefix = self.prompt(k)
            if text.startswith(prefix):
                start = len(prefix)
                empty = template.abilities.empty
                return self._after_empty_thought(text, start, k) if empty else start
            blank = self._blank_thought(k)
            if not at_content and (self.plain or self.thought(k) is None) and not blank:
                raise _rewritten(k)
            if not self.plain and (start := self._start_of_thought(text, k)) is not None:
                return start
            if not at_content and not blank:
                raise _rewritten(k)
        prefix = self._before_content(k)
        if not text.startswith(prefix):
            raise _rewritten(k)
        empty = self._blank_thought(k)
        if not (empty and prefix.endswith(empty)):
            empty = template.abilities.empty
        if empty and prefix.endswith(empty) and self._is_bare(k):
            self.notes.add(EMPTY)
            if template.options.empty_thoughts == "supervise":
                return len(prefix) - len(empty)
        return len(prefix)

    def _before_content(self, k: int) -> str:
        """The text before the content of turn ``k``."""
        turn = {**self.given[k], "content": self.mark}
        if self._blank_thought(k):
            marked = {**self.messages[k], "content": self.mark}
            turn = self.template.abilities.forms.spelled([*self.messages[:k], marked])[-1]
        return self._finished([*self.given[:k], turn]).partition(self.mark)[0]

    def _start_of_thought(self, text: str, k: int) -> int | None:
        """Where the thought of turn ``k`` begins, its opening tag included; None where it is not
        written, or not after a text that ``text`` begins with."""
        if self.thought(k) is None:
            return None
        forms = self.template.abilities.forms
        marked = {**self.messages[k], "reasoning_content": self.mark}
        given = [*self.given[:k], forms.spelled([*self.messages[:k], marked])[-1]]
        before, mark, _ = self._finished(given).partition(self.mark)
        context = self._finished(self.given[:k])  # a header that differs is all that may differ
        if not mark or not text.startswith(before) or not before.startswith(context):
            return None
        # The tag of the thought, or the token that begins its channel, may be the prompt's, too.
        shared = commonprefix([self.prompt(k), before]).rstrip()
        for opening in (forms.tags[0], *self.template.encoder.markers):
            if shared.endswith(opening) and len(shared) - len(opening) >= len(context):
                return len(shared) - len(opening)
        return len(before.rstrip().removesuffix(forms.tags[0]))

    def _marker(self, k: int) -> str:
        """What ends turn ``k``."""
        if not self.messages[k].get("tool_calls"):
            return self.template.end_of_assistant
        end = self.template.abilities.call_end
        if end is None:
            raise RowError("no_end_marker", f"nothing follows the call of message {k}")
        return end

    def _end(self, text: str, start: int, k: int) -> int:
        marker = self._marker(k)
        if not self.messages[k].get("tool_calls") or self.template.abilities.call_end_added:
            place = text.find(marker, start)
            if place < 0:
                raise _unended(k, marker)
            return place + len(marker)
        # Several calls may each be closed by the marker: the turn ends with the last one.
        own = self.text(k + 1)
        end = self._ended(own, start, k)
        if not text.startswith(own[:end]):
            raise _rewritten(k)
        return end

    def weights(self, text: str, span: Span, k: int) -> list[tuple[Span, float]]:
        """How much the characters of turn ``k`` in its ``span`` of ``text`` count, later entries
        before earlier ones; empty where all count alike, and whole. Raises RowError."""
        turn = self.messages[k]
        weight = turn.get("weight", 1.0)
        inner = turn.get("spans") or ()
        if weight == 1 and not inner:
            return []
        found = [(span, float(weight))]
        if not inner:
            return found
        encoder = self.template.encoder
        hidden = turn["content"]
        content = hidden if self.key is None else encoder.revealed(hidden, self.key)
        begins = self._place_of_content(text, span, k)
        for first, end, part in inner:
            first, end = (
                place if self.key is None else len(encoder.hidden(content[:place], self.key))
                for place in (first, end)
            )
            start = max(span[0], begins + first)
            found.append(((start, max(start, min(span[1], begins + end))), float(part)))
        return found

    def _place_of_content(self, text: str, span: Span, k: int) -> int:
        """Where the first character of the content of message ``k`` is in ``text``, or would be if
        the template did not strip it."""
        content = self.messages[k]["content"]
        before = self._before_content(k)
        stripped = content.strip()
        lead = len(content) - len(content.lstrip())
        if text.startswith(before) and text.startswith(content, len(before)):
            return len(before)
        place = text.rfind(stripped, *span)
        if place < 0:
            raise RowError(
                "template_rewrites",
                f"parts of message {k} have weights of their own, and the template changes its "
                "text",
            )
        return place - lead

    def spoken(self, text: str, k: int) -> Span:
        """Characters of message ``k``, which is not the assistant's, in ``text``: its content and
        the control token that closes it. Raises RowError where the template writes another text."""
        content = self.messages[k]["content"]
        start = len(before := self._before_content(k))
        as_json = json.dumps(content, ensure_ascii=False)[1:-1]
        written = (content, content.lstrip(), content.strip(), as_json)
        found = next((one for one in written if text.startswith(one, start)), None)
        if found is None or not text.startswith(before):
            raise RowError(
                "template_rewrites", f"the text of message {k}, which is to be learned, is changed"
            )
        end = start + len(found)
        after = text[end:]
        closing = len(after) - len(after.lstrip())
        for marker in self.template.encoder.markers:
            if after.startswith(marker, closing):
                return start, end + closing + len(marker)
        return start, end

    def answers_in(self, text: str, turns: Sequence[int]) -> Iterator[Span]:
        """Responses that are not trained in ``text``, yet tokenized as where they are; none of a
        template that rewrites them."""
        if self.template.rewrites:
            return
        for k in turns:
            try:
                yield self.span(text, k)
            except RowError as error:
                if error.reason != "template_rewrites":
                    raise


def _rewritten(k: int) -> RowError:
    return RowError(
        "template_rewrites",
        f"the text before assistant turn {k} changes when the dialogue goes on",
    )


def _unended(k: int, marker: str) -> RowError:
    return RowError("no_end_marker", f"{marker!r} does not follow assistant turn {k}")


def _without(message: Message, *names: str) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key not in names}
