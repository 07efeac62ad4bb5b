"""A row of each format in the library's own form, unchecked as to turns: that is the same for all
formats of a type."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from coati.dataset.rows.column_use import Fields, first_of
from coati.dataset.rows.embedded_text import OPENERS, is_messages_text, messages_of
from coati.dataset.rows.messages import (
    Messages,
    common_context,
    dialogue,
    message,
    message_list,
    open_dialogue,
    spoken,
    text,
    turn_text,
)
from coati.dataset.rows.row_errors import RowError

TRUE = ("true", "1", "1.0", "+1", "yes", "y", "t", "good", "desirable", "chosen", "accepted")
FALSE = ("false", "0", "0.0", "-1", "-1.0", "no", "n", "f", "bad", "undesirable", "rejected")
LABELS = dict.fromkeys(TRUE, True) | dict.fromkeys(FALSE, False)
# Columns that say whether the response is a good one; the later ones only when true or false.
JUDGMENTS = ("label", "kto_tag")
FLAGS = ("desirable", "is_desirable", "accepted", "is_correct", "correct", "is_good")
# HelpSteer's, from 0 to 4: "not useful", "borderline unhelpful", "partially", "mostly" and
# "extremely helpful". What is below is a bad response.
RATING = "helpfulness"
HELPFUL = 2
JUDGING = frozenset((*JUDGMENTS, *FLAGS, RATING))
SOURCES = ("source", "data_source")  # where a row comes from, ours and verl's
QUESTIONS = ("prompt", "question", "query", "problem", "input", "text")
TEXTS = ("text", "content", "raw_content")  # where corpora keep a document


class PartRow(dict):
    """A row of a file inside the one that it is a part of: its columns are the file's."""


@dataclass(frozen=True)
class Judged:
    """A response with its ``score``, as the file has it: an element of the list under ``key``,
    whose score inside it, if any, is under ``name``."""

    found: Any
    key: str
    name: str
    score: float


@dataclass
class SourceRow:
    """One row in the library's own form; messages are described in rows/messages.py.

    Attributes:
        messages: sft: the whole conversation; preference: the context; prompt, kto: the prompt.
        chosen, rejected: preference: what follows the context, the assistant first.
        completion, label: kto: the response, and whether it is wanted.
        response: kto: the message whose content ``completion`` is, where it is more than that.
        text: sft, text: a plain text instead of messages: no template, every token and a final
            eos supervised.
        begins, ends: text: whether the document begins and ends with this row; one that is read
            in pieces has several rows.
        tools: OpenAI's schemas of the functions that the assistant may call.
        gt_answer: prompt: the reference answer, for rewards that verify it.
        group: prompt: responses that were judged.
        margin: preference: by how much the chosen response should win.
        weight: preference: how much the pair counts in the loss, 0 or more.
        undecided: preference: why neither response is the better one.
        reward: scored: how good the conversation is; chosen_reward, rejected_reward: of a pair.
        category: kept as ``seq_category``.
        source: prompt: where the row comes from, for rewards by source.
        unanswered: prompt: a response at its end was left out.
        format: the name of the format the row came in.
        notes: what is counted of the row beside its turns, found when it was tokenized.
        unused: the columns and fields that were not read, and whether they carry content that is
            missing now.
        branches: further rows out of the same one, as a tree of messages holds them.
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
    tools: list[dict[str, Any]] | None = None
    gt_answer: str | None = None
    group: list[Judged] = field(default_factory=list)
    margin: float | None = None
    weight: float | None = None
    undecided: str = ""
    reward: float | None = None
    chosen_reward: float | None = None
    rejected_reward: float | None = None
    category: str | None = None
    source: str | None = None
    unanswered: bool = False
    format: str = ""
    notes: frozenset[str] = frozenset()
    unused: dict[str, bool] = field(default_factory=dict, compare=False)
    branches: list["SourceRow"] = field(default_factory=list)


def completion_text(row: SourceRow) -> str | None:
    """All that the response of a labeled row says."""
    return row.completion if row.response is None else turn_text(row.response)


def messages_under(row: Fields, key: str) -> Messages:
    """The list of messages under ``key``."""
    return _listed(row, row[key], key)


def _listed(row: Fields, found: Any, key: str) -> Messages:
    return message_list(found, key, row.use, row.path and f"{row.path}{key}[]")


def prompt_messages(row: Fields, key: str) -> Messages:
    """A prompt as a text, the text of a dialogue, a message, or a list of messages."""
    found = row[key]
    if isinstance(found, dict):
        return [message(found, key, row.use, row.path and f"{row.path}{key}")]
    if not isinstance(found, str):
        return _listed(row, found, key)
    if found[:1] in OPENERS and is_messages_text(found):
        return _listed(row, messages_of(found, key), key)
    return open_dialogue(found, row.use)


def response_messages(row: Fields, key: str) -> Messages:
    """A response as a text, a message, or a list of messages."""
    found = row.answer(key)
    if isinstance(found, str):
        if not (found[:1] in OPENERS and is_messages_text(found)):
            return [spoken("assistant", found.removeprefix(" "), key, row.use)]
        found = messages_of(found, key)
    if isinstance(found, dict):
        return [message(found, key, row.use, row.path and f"{row.path}{key}")]
    return _listed(row, found, key)


def context_pair(key: str) -> Callable[[Fields], SourceRow]:
    """The list of messages under ``key`` and its two responses."""

    def read(row: Fields) -> SourceRow:
        found = row.peek(key)
        if isinstance(found, str) and not found.lstrip().startswith(("[", "{")):
            return SourceRow(messages=prompt_messages(row, key), **two_responses(row))
        return SourceRow(messages=messages_under(row, key), **two_responses(row))

    return read


def two_responses(
    row: Fields, chosen: str = "chosen", rejected: str = "rejected"
) -> dict[str, Messages]:
    """The better and the worse response, under the columns of these names."""
    return {
        "chosen": response_messages(row, chosen),
        "rejected": response_messages(row, rejected),
    }


def whole_pair(row: Fields) -> SourceRow:
    """Two whole conversations, as lists of messages or as texts of hh-rlhf."""
    return split_pair(*(_whole(row, key) for key in ("chosen", "rejected")))


def _whole(row: Fields, key: str) -> Messages:
    found = row.answer(key)
    if not isinstance(found, str):
        return _listed(row, found, key)
    if found[:1] in OPENERS and is_messages_text(found):
        return _listed(row, messages_of(found, key), key)
    if "Human:" not in found and "Assistant:" not in found:
        raise RowError(
            "wrong_keys",
            f"{key} is a text without its prompt: add a column prompt (or question), or name the "
            "one that holds it with --columns prompt=NAME; a text of a whole "
            f"dialogue begins with Human:, found {found[:40].strip()!r}",
        )
    return dialogue(found, key, row.use)


def split_pair(chosen: Messages, rejected: Messages) -> SourceRow:
    """A pair of whole conversations, split where they part."""
    context, chosen, rejected = common_context(chosen, rejected)
    if not context:
        raise RowError(
            "no_question",
            "chosen and rejected begin differently, so they have no question in common",
        )
    return SourceRow(messages=context, chosen=chosen, rejected=rejected)


def judged(row: Fields) -> SourceRow:
    """A prompt, one response to it, and its label."""
    return judged_row(row, prompt_messages(row, "prompt"), response_messages(row, "completion"))


def judged_row(row: Fields, prompt: Messages, answer: Messages) -> SourceRow:
    """The labeled ``answer`` to ``prompt``."""
    if len(answer) != 1 or answer[0]["role"] != "assistant":
        found = ", ".join(m["role"] for m in answer) or "nothing"
        raise RowError(
            "roles_not_alternating",
            f"completion must be one message of the assistant, found {found}",
        )
    return SourceRow(
        messages=prompt,
        completion=answer[0]["content"],
        response=answer[0] if len(answer[0]) > 2 else None,
        label=label_of(row),
    )


def judged_messages(key: str) -> Callable[[Fields], SourceRow]:
    """A conversation whose last response the label is for."""

    def read(row: Fields) -> SourceRow:
        messages = messages_under(row, key)
        return judged_row(row, messages[:-1], messages[-1:])

    return read


def judgment(row: Any) -> str | None:
    """The column that says whether the response of ``row`` is a good one."""
    if not isinstance(row, dict) or JUDGING.isdisjoint(row):
        return None
    return labeled(row) or next((k for k in FLAGS if isinstance(dict.get(row, k), bool)), None)


def labeled(row: dict) -> str | None:
    """The column of :data:`JUDGMENTS` that is a judgment, not a topic for instance."""
    for key in JUDGMENTS:
        found = dict.get(row, key)
        if found is not None and truth_of(found) is not None:
            return key
    return None


def turned_down(row: dict) -> str | None:
    """What says that the response of ``row`` is a bad one, for people to read."""
    if (rating := rating_of(row)) is not None and rating < HELPFUL:
        return f"{RATING} is {rating}, of at most 4"
    key = next((key for key in FLAGS if dict.get(row, key) is False), None)
    return None if key is None else f"{key} is false"


def rating_of(row: dict) -> int | None:
    """HelpSteer's rating of a response."""
    return whole_number(dict.get(row, RATING))


def whole_number(found: Any) -> int | None:
    """A number, perhaps as text or with a fraction of 0, as tables with gaps have it; None for
    what is none."""
    if isinstance(found, bool):
        return None
    try:
        number = float(found)
    except (TypeError, ValueError):
        return None
    return int(number) if number.is_integer() else None


def truth_of(found: Any) -> bool | None:
    """Whether ``found``, a number or a word, means true; None for what means neither."""
    if isinstance(found, bool):
        return found
    if isinstance(found, str | int | float):
        return LABELS.get(str(found).strip().lower())
    return None


def label_of(row: Fields) -> bool:
    key = labeled(row) or judgment(row) or row.first(JUDGMENTS) or "label"
    found = row.get(key)
    row.answers += (key,)
    label = truth_of(found)
    if label is None:
        raise RowError("bad_label", f"{key} is {found!r:.60}, expected true or false")
    return label


def prompt_and_completion(row: Fields) -> SourceRow:
    prompt = prompt_messages(row, "prompt")
    return SourceRow(messages=prompt + response_messages(row, "completion"))


def listed(key: str) -> Callable[[Fields], SourceRow]:
    """A conversation: the list of messages under ``key``."""
    return lambda row: SourceRow(messages=messages_under(row, key))


def source_target(row: Fields) -> SourceRow:
    names = {str(key).lower(): key for key in row}
    parts = [text(row[names[k]] or "", k) for k in ("source", "target") if k in names]
    return SourceRow(text="\n".join(part for part in parts if part))


def plain_text(row: Fields) -> SourceRow:
    return SourceRow(text=_no_messages(row["text"], "text"))


def _no_messages(found: str, key: str) -> str:
    """A text that is none but messages written out would be trained on as it stands."""
    if found[:1] in OPENERS and is_messages_text(found):
        raise RowError(
            "content_not_text",
            f"{key} is a text in which messages are written out ({found.strip()[:40]}...); write "
            "them as a list, not as a text of it",
        )
    return found


def document(row: Fields) -> SourceRow:
    """A document: what a row has under the first of TEXTS, or a text of a .txt file, which may be
    a piece of one and comes as a prompt."""
    key = text_column(row)
    if key is not None:
        return SourceRow(text=_no_messages(row[key], key))
    found = row["prompt"]
    return SourceRow(
        text=found, begins=getattr(found, "begins", True), ends=getattr(found, "ends", True)
    )


def text_column(row: Any) -> str | None:
    """The first of TEXTS under which the row has a text."""
    if not isinstance(row, dict):
        return None
    return next((key for key in TEXTS if isinstance(dict.get(row, key), str)), None)


def first_question(row: Any) -> str | None:
    """The first of QUESTIONS that the row has."""
    return first_of(QUESTIONS, row) if isinstance(row, dict) else None


def rl_example(row: Fields) -> SourceRow:
    return SourceRow(
        messages=[message(row["messages"], "messages", row.use, f"{row.path}messages")]
    )
