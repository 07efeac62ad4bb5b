"""A row of each format in the library's own form, unchecked as to turns: that is the same for all
formats of a type."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from coati.dataset.rows.messages import (
    Messages,
    common_context,
    dialogue,
    message,
    message_list,
    open_dialogue,
    text,
)
from coati.dataset.rows.row_errors import RowError

LABELS = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}
QUESTIONS = ("prompt", "question", "query", "problem", "text")
TEXTS = ("text", "content", "raw_content")  # where corpora keep a document
_WRITTEN_OUT = re.compile(
    r"""\s*\[?\s*\{\s*["'](role|from|messages|conversations)["']\s*:\s*["'\[]"""
)


@dataclass
class SourceRow:
    """One row in the library's own form: messages of {role, content}, roles system, user,
    assistant.

    Attributes:
        messages: sft: the whole conversation; preference: the context; prompt, kto: the prompt.
        chosen, rejected: preference: what follows the context, the assistant first.
        completion, label: kto: the response, and whether it is wanted.
        response: kto: the message whose content ``completion`` is, where it is more than that.
        text: sft, text: a plain text instead of messages: no template, every token and a final
            eos supervised.
        begins, ends: text: whether the document begins and ends with this row; one that is read
            in pieces has several rows.
        gt_answer: prompt: the reference answer, for rewards that verify it.
        margin: preference: by how much the chosen response should win.
        category: kept as ``seq_category``.
        unanswered: prompt: a response at its end was left out.
        format: the name of the format the row came in.
        tools: OpenAI's schemas of the functions that the assistant may call.
        notes: what is counted of the row beside its turns, found when it was tokenized.
    """

    messages: Messages = field(default_factory=list)
    chosen: Messages = field(default_factory=list)
    rejected: Messages = field(default_factory=list)
    completion: str | None = None
    label: bool | None = None
    response: dict[str, Any] | None = None
    text: str | None = None
    begins: bool = True
    ends: bool = True
    gt_answer: str | None = None
    margin: float | None = None
    category: str | None = None
    unanswered: bool = False
    format: str = ""
    tools: list[dict[str, Any]] | None = None
    notes: frozenset[str] = frozenset()


def _prompt_messages(found: Any) -> Messages:
    return open_dialogue(found) if isinstance(found, str) else message_list(found, "prompt")


def _response_messages(found: Any, key: str) -> Messages:
    """A response as a text, a message, or a list of messages."""
    if isinstance(found, str):
        return [{"role": "assistant", "content": found.removeprefix(" ")}]
    return [message(found, key)] if isinstance(found, dict) else message_list(found, key)


def context_pair(key: str) -> Callable[[dict], SourceRow]:
    """The list of messages under ``key`` and its two responses."""
    return lambda row: SourceRow(messages=message_list(row[key], key), **_two_responses(row))


def _two_responses(row: dict) -> dict[str, Messages]:
    return {key: _response_messages(row[key], key) for key in ("chosen", "rejected")}


def prompt_pair(row: dict) -> SourceRow:
    if isinstance(row["chosen"], str) and row["chosen"].lstrip().startswith("Human:"):
        return whole_pair(row)
    pair = _two_responses(row)
    if pair["chosen"] and pair["chosen"][0]["role"] != "assistant":
        return _split_pair(**pair)  # whole conversations beside the prompt they begin with
    return SourceRow(messages=_prompt_messages(row[first_question(row)]), **pair)


def instruction_pair(row: dict) -> SourceRow:
    return SourceRow(messages=alpaca({**row, "output": None}).messages, **_two_responses(row))


def whole_pair(row: dict) -> SourceRow:
    """Two whole conversations, as lists of messages or as texts of hh-rlhf."""
    found = {key: row[key] for key in ("chosen", "rejected")}
    return _split_pair(
        *(
            dialogue(f, key) if isinstance(f, str) else message_list(f, key)
            for key, f in found.items()
        )
    )


def _split_pair(chosen: Messages, rejected: Messages) -> SourceRow:
    context, chosen, rejected = common_context(chosen, rejected)
    if not context:
        raise RowError(
            "no_question",
            "chosen and rejected begin differently, so they have no question in common",
        )
    return SourceRow(messages=context, chosen=chosen, rejected=rejected)


def judged(row: dict) -> SourceRow:
    answer = _response_messages(row["completion"], "completion")
    if len(answer) != 1 or answer[0]["role"] != "assistant":
        found = ", ".join(m["role"] for m in answer) or "nothing"
        raise RowError(
            "roles_not_alternating",
            f"completion must be one message of the assistant, found {found}",
        )
    return SourceRow(
        messages=_prompt_messages(row["prompt"]), completion=answer[0]["content"], label=_label(row)
    )


def _label(row: dict) -> bool:
    found = row.get("label")
    label = (
        LABELS.get(found.lower() if isinstance(found, str) else found)
        if isinstance(found, str | int)
        else None
    )
    if label is None:
        raise RowError("bad_label", f"label is {found!r}, expected true or false")
    return label


def prompt_and_completion(row: dict) -> SourceRow:
    response = _response_messages(row["completion"], "completion")
    return SourceRow(messages=_prompt_messages(row["prompt"]) + response)


def listed(key: str) -> Callable[[dict], SourceRow]:
    return lambda row: SourceRow(messages=message_list(row[key], key))


def message_rows(row: list) -> SourceRow:
    return SourceRow(messages=message_list(row, "the row"))


def alpaca(row: dict) -> SourceRow:
    """Earlier rounds, then instruction and optional input as the question, and the output, if any,
    as the response."""
    parts = {name: text(row.get(name) or "", name) for name in ("instruction", "input", "output")}
    asked = "\n\n".join(part for part in (parts["instruction"], parts["input"]) if part)
    messages = [*_history(row.get("history") or []), {"role": "user", "content": asked}]
    if row.get("output") is not None:
        messages.append({"role": "assistant", "content": parts["output"]})
    return SourceRow(messages=messages)


def _history(rounds: Any) -> Messages:
    """Earlier rounds as ``[question, response]`` pairs."""
    if not isinstance(rounds, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in rounds
    ):
        raise RowError("wrong_keys", "history must be a list of [question, answer] pairs")
    return [
        {"role": role, "content": text(said, "history")}
        for pair in rounds
        for role, said in zip(("user", "assistant"), pair, strict=True)
    ]


def source_target(row: dict) -> SourceRow:
    found = {str(key).lower(): value for key, value in row.items()}
    parts = [text(found[name] or "", name) for name in ("source", "target")]
    return SourceRow(text="\n".join(part for part in parts if part))


def plain_text(row: dict) -> SourceRow:
    return SourceRow(text=_no_messages(row["text"], "text"))


def _no_messages(found: str, key: str) -> str:
    """A text that is none but messages written out as JSON would be trained on as it stands."""
    if _WRITTEN_OUT.match(found):
        raise RowError(
            "content_not_text",
            f"{key} is a text in which messages are written out ({found.strip()[:40]}...); write "
            "them as a list, not as a text of it",
        )
    return found


def document(row: Any) -> SourceRow:
    """A document: a text, or a piece of one, or what a row has under the first of TEXTS."""
    if isinstance(row, str):
        return SourceRow(
            text=row, begins=getattr(row, "begins", True), ends=getattr(row, "ends", True)
        )
    key = text_column(row)
    return SourceRow(text=_no_messages(row[key], key))


def text_column(row: Any) -> str | None:
    """The first of TEXTS under which the row has a text."""
    found = (key for key in TEXTS if isinstance(row, dict) and isinstance(row.get(key), str))
    return next(found, None)


def first_question(row: Any) -> str | None:
    """The first of QUESTIONS that the row has."""
    return (
        next((key for key in QUESTIONS if row.get(key) is not None), None)
        if isinstance(row, dict)
        else None
    )


def plain(row: Any) -> SourceRow:
    found = row if isinstance(row, str) else row[first_question(row)]
    return SourceRow(messages=_prompt_messages(found))


def rl_example(row: dict) -> SourceRow:
    return SourceRow(messages=[message(row["messages"], "messages")])
