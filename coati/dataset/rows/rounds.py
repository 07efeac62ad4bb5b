"""Rows that hold a question and what belongs to it in columns of their own: instruction, input,
context, choices, earlier rounds, a thought, and the response."""

import json
import re
from collections.abc import Callable
from typing import Any

from coati.dataset.rows.column_use import SWITCHES, Fields, first_of, holds
from coati.dataset.rows.embedded_text import decoded
from coati.dataset.rows.messages import Message, Messages, message_list, spoken, text
from coati.dataset.rows.numerals import index_of, is_number
from coati.dataset.rows.row_errors import RowError
from coati.dataset.rows.source_row import (
    SourceRow,
    first_question,
    judged_row,
    prompt_messages,
    response_messages,
    split_pair,
    two_responses,
    whole_pair,
)
from coati.dataset.rows.thoughts import FIELDS as THOUGHTS
from coati.dataset.rows.tool_calls import calls_of

# The question, the first that is there; and the response, a reference answer last.
ASKED = ("prompt", "question", "query", "problem", "instruction", "input")
RESPONSES = ("response", "output", "completion", "solution", "answer", "target")
CHOICES = ("choices", "options")
KEYS_OF_CHOICE = ("answer", "answerKey", "answer_key", "answer_idx", "answer_index", "label")
COTS = (*THOUGHTS, "complex_cot", "rationale", "chain_of_thought", "cot")
_COTS = frozenset(COTS)
_CHOICES = frozenset(CHOICES)
# What belongs to a question beside its own column.
_AROUND = ("instruction", "input", "context", "passage")  # the first of them before it
BESIDE = frozenset(("history", *_AROUND, *CHOICES))
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LABEL = re.compile(r"(?:option|choice|answer|op)?[ _-]?\(?(?:[a-z]|\d{1,2})[).]*", re.IGNORECASE)


def asked_key(row: dict) -> str | None:
    """The column with the question."""
    return first_of(ASKED, row)


def response_key(row: dict) -> str | None:
    """The column with the response."""
    asked = asked_key(row)
    return first_of((key for key in RESPONSES if key != asked), row)


def asked(row: Fields, key: str | None = None) -> Messages:
    """Earlier rounds and the question under ``key``: with it instruction, input, context and
    choices, one after the other with a blank line between."""
    key = key or asked_key(row) or "instruction"
    if key not in BESIDE and BESIDE.isdisjoint(row):
        return prompt_messages(row, key)
    before = _history(row)
    if key == "instruction":
        messages = [{"role": "user", "content": text(row.get(key) or "", key)}]
    else:
        messages = prompt_messages(row, key)
    if messages and messages[-1]["role"] == "user":
        first, *more = (
            _extra(row, name) if name in row and name != key else "" for name in _AROUND
        )
        parts = (first, messages[-1]["content"], *more, _choices(row))
        messages[-1] = {**messages[-1], "content": "\n\n".join(filter(None, parts))}
    if not before:
        return messages
    first = int(bool(messages) and messages[0]["role"] == "system")
    return [*messages[:first], *before, *messages[first:]]


def _extra(row: Fields, name: str) -> str:
    found = row.peek(name)
    if not found:
        return ""
    if isinstance(found, list) and all(isinstance(one, str) for one in found):
        return "\n\n".join(row[name])
    return text(row[name], name)


def options(row: dict) -> list[tuple[str, str]]:
    """``(letter, text)`` of each choice of a question; none where it has no choices."""
    key = next((key for key in CHOICES if holds(dict.get(row, key))), None)
    if key is None:
        return []
    found = dict.get(row, key)
    if isinstance(found, str):
        found = decoded(found) or found
    if isinstance(found, dict) and isinstance(found.get("text"), list):
        labels = found.get("label") or LETTERS[: len(found["text"])]
        if not isinstance(labels, list | str) or len(labels) != len(found["text"]):
            raise RowError("bad_scores", f"{key} has other labels than texts: {found!r:.60}")
        found = list(zip(map(str, labels), found["text"], strict=False))
    elif isinstance(found, dict):
        if not all(map(_LABEL.fullmatch, map(str, found))):
            return []  # other options, of a generation for instance
        found = [(str(letter), one) for letter, one in found.items()]
    elif isinstance(found, list) and len(found) <= len(LETTERS):
        found = list(zip(LETTERS, found, strict=False))
    else:
        found = [("", None)]
    if not all(isinstance(one, str | int | float) for _, one in found):
        raise RowError(
            "bad_scores",
            f"{key} is {dict.get(row, key)!r:.60}, expected a list of at most {len(LETTERS)} "
            f"texts; if it holds no choices: --columns {key}=",
        )
    return [(letter, str(one)) for letter, one in found]


def _choices(row: Fields) -> str:
    found = [] if _CHOICES.isdisjoint(row) else options(row)
    if not found:
        return ""
    key = next(key for key in CHOICES if holds(row.peek(key)))
    value = row[key]
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        inner = row.inside(key)
        inner.get("text")
        inner.get("label")
    return "\n".join(f"{letter}. {one}" for letter, one in found)


def chosen_letter(row: Fields, answer: Any) -> str | None:
    """The letter of the choice that ``answer`` names by letter, text or index. Raises RowError for
    a number that names none."""
    found = options(row)
    if not found or isinstance(answer, bool) or not isinstance(answer, int | str):
        return None
    said = str(answer).strip()
    letters = [letter for letter, _ in found]
    if said in letters:
        return said
    index = index_of(answer)
    by_index = None if index is None or index >= len(letters) else letters[index]
    by_text = next((letter for letter, one in found if one.strip() == said), None)
    # A text that is one of the choices is no index of another.
    letter = by_text or by_index if isinstance(answer, str) else by_index or by_text
    if letter is None and isinstance(answer, int):
        raise RowError("bad_scores", f"{answer} names none of the {len(found)} choices")
    return letter


def _history(row: Fields) -> Messages:
    """Earlier rounds as ``[question, response]`` pairs, or as messages."""
    if "history" not in row:
        return []
    rounds = row.get("history") or []
    if isinstance(rounds, str):
        rounds = decoded(rounds) or rounds
    if isinstance(rounds, list) and rounds and all(isinstance(one, dict) for one in rounds):
        return message_list(rounds, "history", row.use)
    if not isinstance(rounds, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in rounds
    ):
        raise RowError("wrong_keys", "history must be a list of [question, answer] pairs")
    return [
        spoken(role, text(said, "history"), "history", row.use)
        for pair in rounds
        for role, said in zip(("user", "assistant"), pair, strict=True)
    ]


def answered(row: Fields) -> Messages:
    """The response of a row, with the thought that a column of its own holds."""
    key = response_key(row)
    letter = chosen_letter(row, row.peek(key)) if key in KEYS_OF_CHOICE else None
    if letter is not None:
        row.answer(key)
        messages = [{"role": "assistant", "content": letter}]
    elif is_number(row.peek(key)):
        messages = [{"role": "assistant", "content": str(row.answer(key))}]
    else:
        messages = response_messages(row, key)
    return _with_thought(row, messages) if messages else messages


def _thought(row: Fields) -> str:
    if _COTS.isdisjoint(row):
        return ""
    key = next((key for key in COTS if _is_thought(row.peek(key))), None)
    return row.answer(key) if key else ""


def _is_thought(found: Any) -> bool:
    """Whether a column holds a thought, not a switch for thoughts."""
    return isinstance(found, str) and holds(found) and found.strip().lower() not in SWITCHES


def one_round(row: Fields) -> SourceRow:
    """A question and its response."""
    return SourceRow(messages=asked(row) + answered(row))


def asked_alone(row: Fields) -> SourceRow:
    """A question; what answers it is the reference."""
    return SourceRow(messages=asked(row))


def plain(row: Fields) -> SourceRow:
    """A question alone."""
    key = first_question(row)
    if key == "text":
        return SourceRow(messages=prompt_messages(row, key))
    return SourceRow(messages=asked(row, key))


def instruction_pair(row: Fields) -> SourceRow:
    return SourceRow(messages=asked(row, "instruction"), **two_responses(row))


def alpaca(row: Fields) -> SourceRow:
    """Earlier rounds, then instruction and optional input as the question, and the output, if any,
    as the response."""
    messages = asked(row, "instruction")
    if row.peek("output") is not None:
        messages += [spoken("assistant", text(row.answer("output"), "output"), "output", row.use)]
    return SourceRow(messages=_with_thought(row, messages))


def _with_thought(row: Fields, messages: Messages) -> Messages:
    last = messages[-1]
    if last["role"] != "assistant" or "reasoning_content" in last:
        return messages
    thought = _thought(row)
    if not thought:
        return messages
    last = {key: value for key, value in last.items() if key != "thought_marks"}
    return [*messages[:-1], {**last, "reasoning_content": thought}]


def judged_round(row: Fields) -> SourceRow:
    """A question, one response, and its label."""
    return judged_row(row, asked(row), answered(row))


def prompt_pair(row: Fields) -> SourceRow:
    """A question and two responses, or whole conversations beside it."""
    chosen = row.peek("chosen")
    if isinstance(chosen, str) and chosen.lstrip().startswith("Human:"):
        return _beside(row, whole_pair(row))
    pair = two_responses(row)
    if pair["chosen"] and pair["chosen"][0]["role"] != "assistant":
        return _beside(row, split_pair(**pair))
    return SourceRow(messages=asked(row), **pair)


def _beside(row: Fields, pair: SourceRow) -> SourceRow:
    """Whole conversations that begin with the prompt, which is read with them."""
    key = asked_key(row)
    texts = {one["content"].strip() for one in pair.messages}
    if key and not {one["content"].strip() for one in prompt_messages(row, key)} <= texts:
        row.unread(key)
    return pair


def rm_static_pair(row: Fields) -> SourceRow:
    """``response`` repeats one of the two."""
    pair = prompt_pair(row)
    if row.peek("response") in (row.peek("chosen"), row.peek("rejected")):
        row.get("response")
    return pair


def messages_pair(key: str) -> Callable[[Fields], SourceRow]:
    """A conversation whose last response is the better one, and another in its place."""

    def read(row: Fields) -> SourceRow:
        messages = message_list(row[key], key, row.use, f"{key}[]")
        end = len(messages)
        while end and messages[end - 1]["role"] in ("assistant", "tool"):
            end -= 1
        rejected = response_messages(row, row.first(("rejected", "rejected_messages")))
        chosen = messages[end:]
        if rejected and rejected[0]["role"] != "assistant":
            return split_pair(messages, rejected)
        return SourceRow(messages=messages[:end], chosen=chosen, rejected=rejected)

    return read


def paired_rounds(key: str) -> Callable[[Fields], SourceRow]:
    """Rounds as objects: ``{"human", "assistant"}`` of Firefly, ``{"input", "output"}`` of XTuner,
    with a system message in the first of them."""

    def read(row: Fields) -> SourceRow:
        messages: Messages = []
        for found in row[key]:
            one = Fields(found, row.use, f"{key}[].")
            system = None if messages else one.take(("system",))
            if system:
                messages.append({"role": "system", "content": text(system, f"{key}: system")})
            for role, names in (_ASKER, _SPEAKER):
                name = one.first(names)
                if name is None:
                    raise RowError("wrong_keys", f"{key} has a round without {' or '.join(names)}")
                messages.append(spoken(role, text(one[name], name), f"{key}: {name}", row.use))
            one.close()
        return SourceRow(messages=messages)

    return read


_ASKER = ("user", ("human", "user", "input"))
_SPEAKER = ("assistant", ("assistant", "bot", "gpt", "output"))


def called(row: Fields) -> SourceRow:
    """xLAM's rows: a query and, as JSON text, the calls that answer it."""
    calls = calls_of(row.answer("answers"), row.use, "answers[].", "answers")
    response: Message = {"role": "assistant", "content": "", "tool_calls": calls}
    return SourceRow(messages=[*asked(row), response])


def is_calls(found: Any) -> bool:
    """Whether ``found`` is a list of calls, perhaps as JSON text."""
    if isinstance(found, str) and found.lstrip().startswith("["):
        try:
            found = json.loads(found)
        except ValueError:
            return False
    return (
        isinstance(found, list)
        and bool(found)
        and all(isinstance(one, dict) and "name" in one and "arguments" in one for one in found)
    )
