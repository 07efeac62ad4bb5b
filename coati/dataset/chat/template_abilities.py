"""What a chat template does with thoughts and tools, learned from probes: in which form it reads
them, whether it writes or drops them, and where a call ends."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from os.path import commonprefix
from typing import Any

import jinja2

from coati.dataset.chat.message_forms import (
    PARTS,
    RESULT_ROLES,
    TEXT,
    THOUGHT_FIELDS,
    THOUGHT_TAGS,
    MessageForms,
    Messages,
    Tools,
)
from coati.dataset.chat.schema_parts import lost_parts

# (messages, generation prompt, tools) -> text
Render = Callable[[Messages, bool, dict[str, Any]], str]
# Of which responses thoughts are written.
ALL = "all"
LAST = "last"
NONE = "none"

QUESTION = {"role": "user", "content": "Probe question number one"}
ANSWER = "Probe answer number one"
THOUGHT = "Probe thought"
NAME = "probe_function"
VALUE = "Probe value"
RESULT = "Probe result"
# Of a second call in the same turn.
OTHER_NAME = "second_probe"
OTHER_VALUE = "Other value"
OTHER_RESULT = "Other outcome"

LONG_ID = "call_probe_function_1"
OTHER_ID = "call_second_probe_2"
SCHEMA = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": "Probe description",
        "parameters": {
            "type": "object",
            "properties": {"probe_argument": {"type": "string", "description": "Probe argument"}},
            "required": ["probe_argument"],
        },
    },
}


@dataclass(frozen=True)
class Abilities:
    """What a template does with what is more than role and text.

    Attributes:
        forms: the form in which it reads thoughts and calls.
        thoughts: of which responses of a dialogue it writes the thoughts: ``all``, ``last`` (those
            after the last question), or ``none``.
        empty: what it writes between the generation prompt, or where a response begins, and a
            response without a thought, if an empty thought is in it; else "".
        cuts: ``first`` or ``last``, where it takes what stands before that closing tag of a thought
            in a text for a thought, or drops it; "" where such a text is written as it is.
        tools, calls, results: whether it writes the schemas, the calls, and their results.
        lost_parts: of the schemas, those that it does not write (schema_parts.py).
        call_end: what ends a response that calls a tool, None where nothing does.
        call_end_added: whether that is written by the result that follows, not by the call.
        speaks_and_calls: whether it writes a text beside calls.
        calls_beside_text: whether it writes calls beside a text.
        parallel_calls: whether it writes several calls of one turn.
        parallel_results: whether it writes the results of several calls.
        call_marks: control tokens between two calls of a turn, which do not end it.
    """

    forms: MessageForms = MessageForms()
    thoughts: str = NONE
    empty: str = ""
    cuts: str = ""
    tools: bool = False
    calls: bool = False
    results: bool = False
    lost_parts: frozenset[str] = frozenset()
    call_end: str | None = None
    call_end_added: bool = False
    speaks_and_calls: bool = True
    calls_beside_text: bool = True
    parallel_calls: bool = True
    parallel_results: bool = True
    call_marks: frozenset[str] = frozenset()

    @property
    def opened(self) -> str:
        """What its generation prompt opens a thought with, "" where it opens none."""
        return self.forms.opened

    @property
    def lacking(self) -> str:
        """What a template without whole support of tools does not write; "" where it has it."""
        return ", ".join(
            what
            for what, there in (
                ("tools", self.tools),
                ("calls of tools", self.calls),
                ("results of tools", self.results),
            )
            if not there
        )


class AbilityProbe:
    """Finds the :class:`Abilities` of the template that ``render`` renders.

    ``controls`` are the texts of control tokens; ``end`` ends a response, ``header`` precedes one
    where there is no generation prompt; ``source`` is the template's own text.
    """

    def __init__(
        self, render: Render, controls: Sequence[str], end: str, header: str, source: str
    ) -> None:
        self._render = render
        self._controls = controls
        self._end = end
        self._header = header
        self._source = source

    def abilities(self) -> Abilities:
        forms = self._tool_forms()
        thoughts, forms = self._thoughts(replace(forms, opened=self._opened()))
        found = Abilities(
            forms=forms,
            thoughts=thoughts,
            empty=self._empty(),
            cuts=self._cuts(forms.tags[1]),
            tools=forms.tools_name != "",
            lost_parts=self._lost_parts(forms.tools_name),
        )
        found = replace(found, forms=replace(forms, tools_name=forms.tools_name or "tools"))
        return self._with_calls(found)

    def text(self, messages: Messages, generation: bool = False, **variables: Any) -> str:
        """The rendered text, "" where the template refuses."""
        try:
            text = self._render(messages, generation, variables)
        except (jinja2.TemplateError, ValueError):
            return ""
        return text + self._header if generation else text

    # thoughts

    def _thoughts(self, forms: MessageForms) -> tuple[str, MessageForms]:
        tags = next((tags for tags in THOUGHT_TAGS if tags[1] in self._source), THOUGHT_TAGS[0])
        for field in (*THOUGHT_FIELDS, PARTS, TEXT):
            tried = replace(forms, thought=field, tags=tags)
            text = self.text(tried.spelled([QUESTION, _answer(THOUGHT)]))
            if THOUGHT in text and ANSWER in text and "'thinking'" not in text:
                dialogue = [QUESTION, _answer(THOUGHT), QUESTION, _answer("")]
                kept = THOUGHT in self.text(tried.spelled(dialogue))
                return (ALL if kept else LAST), replace(tried, reads_text=self._reads_text(tried))
        return NONE, replace(forms, tags=tags)

    def _reads_text(self, forms: MessageForms) -> bool:
        said = [QUESTION, _answer(THOUGHT)]
        texts = (self.text(each.spelled(said)) for each in (forms, replace(forms, thought=TEXT)))
        return len({"".join(text.split()) for text in texts}) == 1

    def _opened(self) -> str:
        """The end of the generation prompt, from the tag on that opens a thought."""
        prompt = self.text([QUESTION], True)
        for opening, closing in THOUGHT_TAGS:
            start = prompt.rfind(opening)
            if start >= 0 and closing not in prompt[start:] and prompt.rstrip().endswith(opening):
                return prompt[start:]
        return ""

    def _empty(self) -> str:
        plain = self.text([QUESTION]), self.text([QUESTION], True)
        whole = self.text([QUESTION, _answer("")])
        if ANSWER not in whole:
            return ""
        before, prompt = plain
        answer = whole.index(ANSWER)
        tags = "|".join(rf"{re.escape(o)}\s*{re.escape(c)}" for o, c in THOUGHT_TAGS)
        start = len(prompt) if whole.startswith(prompt) else None
        beginning = len(before) if whole.startswith(before) else len(commonprefix([whole, prompt]))
        found = list(re.finditer(tags, whole[beginning:answer]))
        # A generation prompt may hold the empty thought already.
        if not found or (start is not None and beginning + found[-1].end() <= start):
            return ""
        return whole[beginning + found[-1].start() if start is None else start : answer]

    def _cuts(self, closing: str) -> str:
        said = f"Probe beginning{closing}Probe middle{closing}{ANSWER}"
        text = self.text([QUESTION, {"role": "assistant", "content": said}])
        if said in text or ANSWER not in text:
            return ""
        return "first" if f"Probe middle{closing}{ANSWER}" in text else "last"

    # tools

    def _lost_parts(self, name: str) -> frozenset[str]:
        if not name:
            return frozenset()
        return lost_parts(lambda tools: self.text([QUESTION], True, **{name: tools}))

    def _tool_forms(self) -> MessageForms:
        forms = MessageForms(tools_name="")
        for name in ("tools", "xml_tools"):
            if NAME in self.text([QUESTION], True, **{name: [SCHEMA]}):
                forms = replace(forms, tools_name=name)
                break
        for ids, as_text, null in product(("", "any", "named"), (False, True), (False, True)):
            tried = replace(forms, call_ids=ids, arguments_as_text=as_text, null_content=null)
            if self._writes_call(tried):
                return self._result_form(tried)
        return forms

    def _writes_call(self, forms: MessageForms) -> bool:
        text = self.text(forms.spelled([QUESTION, _call()]))
        # Python's way to write an object, or JSON within JSON, is not what a model should learn.
        garbled = "'probe_argument'" in text or '\\"probe_argument' in text
        return NAME in text and VALUE in text and "probe_argument" in text and not garbled

    def _result_form(self, forms: MessageForms) -> MessageForms:
        """``forms`` that write a result too, if there are such."""
        ids = (forms.call_ids,) if forms.call_ids else ("", "any")
        for role, name, id_form in product(RESULT_ROLES, (False, True), ids):
            tried = replace(forms, result_role=role, result_name=name, call_ids=id_form)
            if RESULT in self.text(tried.spelled(_tool_round())):
                long = [QUESTION, _call(LONG_ID), {**_result(), "tool_call_id": LONG_ID}]
                refused = RESULT not in self.text(tried.spelled(long))
                return replace(tried, call_ids="nine") if refused else tried
        return forms

    def _with_calls(self, found: Abilities) -> Abilities:
        forms = found.forms
        if not self._writes_call(forms):
            return found
        own = self.text(forms.spelled([QUESTION, _call()]))
        both = self.text(forms.spelled([*_tool_round(), _answer("")])) or self.text(
            forms.spelled(_tool_round())
        )
        pair = self.text(forms.spelled([QUESTION, _two_calls()]))
        between = _between(pair)
        end, added = self._call_end(own, both, between or "")
        spoken = self.text(forms.spelled([QUESTION, {**_call(), "content": ANSWER}]))
        called = all(each in spoken for each in (NAME, VALUE))
        round = self.text(forms.spelled([QUESTION, _two_calls(), *_two_results()]))
        return replace(
            found,
            forms=forms if called else replace(forms, calls_alone=True),
            calls=True,
            results=RESULT in both,
            call_end=end,
            call_end_added=added,
            speaks_and_calls=ANSWER in spoken,
            calls_beside_text=called,
            parallel_calls=between is not None,
            parallel_results=all(each in round for each in (RESULT, OTHER_RESULT)),
            call_marks=frozenset(
                mark for mark in self._controls if mark in (between or "") and mark != end
            ),
        )

    def _call_end(self, own: str, both: str, between: str) -> tuple[str | None, bool]:
        """What ends the call in ``own``, which ends with it, and ``both``, where its result
        follows; and whether it is written in the latter alone. What stands ``between`` two calls of
        a turn ends none, unless there is nothing else."""
        common = commonprefix([own, both]) if both else own
        last = max(common.rfind(piece) + len(piece) for piece in (NAME, VALUE))
        tail = common[last:]
        if self._end and self._end in tail and self._end not in between:
            return self._end, False
        inside = [(tail.rfind(control), control) for control in self._controls if control in tail]
        ends = [each for each in inside if each[1] not in between]
        if ends:
            return max(ends)[1], False
        after = both[len(common) :].lstrip()
        for control in self._controls:
            if after.startswith(control) and own.strip() == common.strip():
                return control, True
        return (max(inside)[1], False) if inside else (None, False)


def _between(pair: str) -> str | None:
    """The text between the two calls of a turn, None where they are not both written."""
    first = pair.find(VALUE)
    second = pair.find(OTHER_NAME, first)
    if first < 0 or second < 0 or OTHER_VALUE not in pair or NAME not in pair:
        return None
    return pair[first + len(VALUE) : second]


def _answer(thought: str) -> dict[str, Any]:
    answer = {"role": "assistant", "content": ANSWER}
    return answer | {"reasoning_content": thought} if thought else answer


def _call(call_id: str | None = None) -> dict[str, Any]:
    call: dict[str, Any] = {
        "type": "function",
        "function": {"name": NAME, "arguments": {"probe_argument": VALUE}},
    }
    if call_id:
        call["id"] = call_id
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _result() -> dict[str, Any]:
    return {"role": "tool", "content": RESULT}


def _two_calls() -> dict[str, Any]:
    turn = _call(LONG_ID)
    other = {
        "type": "function",
        "function": {"name": OTHER_NAME, "arguments": {"probe_argument": OTHER_VALUE}},
        "id": OTHER_ID,
    }
    return turn | {"tool_calls": [*turn["tool_calls"], other]}


def _two_results() -> Messages:
    other = {"role": "tool", "content": OTHER_RESULT, "tool_call_id": OTHER_ID}
    return [{**_result(), "tool_call_id": LONG_ID}, other]


def _tool_round() -> Messages:
    return [QUESTION, _call(), _result()]


def tool_dialogue() -> tuple[Messages, Tools]:
    """A round with a thought, a call, its result and a response, for people to look at."""
    call = {**_call(), "reasoning_content": THOUGHT}
    return [QUESTION, call, _result(), _answer("")], [SCHEMA]
