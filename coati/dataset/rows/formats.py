"""Which format a row has, and whether the row can be used for a type; :data:`DATASET_FORMATS` is
the table of formats.

A format is one entry: its name, what its rows hold, how they are recognized and read. The first
entry that fits a row wins, so the ones with more keys come first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from coati.dataset.data_types import DATA_TYPES
from coati.dataset.rows import format_keys as keys
from coati.dataset.rows import message_trees as trees
from coati.dataset.rows import rounds
from coati.dataset.rows import scored_pairs as scored
from coati.dataset.rows import source_row as read
from coati.dataset.rows.column_names import Layout, renamed
from coati.dataset.rows.column_use import ColumnUse, Fields
from coati.dataset.rows.embedded_text import decoded
from coati.dataset.rows.format_errors import wrong_row
from coati.dataset.rows.glaive import glaive, is_glaive
from coati.dataset.rows.ground_truths import COLUMNS as TRUTHS
from coati.dataset.rows.ground_truths import TESTS, ground_truth
from coati.dataset.rows.messages import is_message_list, text, turn_text
from coati.dataset.rows.numerals import number_of
from coati.dataset.rows.row_errors import RowError
from coati.dataset.rows.row_scores import add_scores
from coati.dataset.rows.source_row import JUDGING, RATING, SOURCES, SourceRow
from coati.dataset.rows.tool_calls import tools_of


@dataclass(frozen=True)
class DatasetFormat:
    """``holds`` is one of :data:`CONTENTS`; ``keys`` are what a row must have, for people to read;
    ``read`` fills a SourceRow, unchecked as to turns, from the row as :class:`Fields`."""

    name: str
    holds: str
    keys: tuple[str, ...]
    matches: Callable[[Any], bool]
    read: Callable[[Fields], SourceRow]

    @cached_property
    def types(self) -> tuple[str, ...]:
        """The data types that can be made of it, the most particular one first."""
        reading = [type for type in DATA_TYPES.values() if self.holds in type.reads]
        return tuple(type.name for type in sorted(reading, key=lambda type: len(type.reads)))

    @cached_property
    def suggested(self) -> tuple[str, ...]:
        """The types to name to someone who has such rows: one for scores is for those who say so,
        unless nothing else reads them."""
        plain = tuple(name for name in self.types if not DATA_TYPES[name].scored)
        return plain or self.types


_PAIR = ("chosen", "rejected")
_JUDGED = ("prompt", "completion", "label")
_ROUND = ("prompt", "completion")
_TALK = "conversations"
_RM_STATIC = keys.has("response", prompt=str, chosen=str, rejected=str)
# What rows of a format hold; each data type says which of these it reads.
CONTENTS = ("pair", "judged", "conversation", "prompt", "text", "document", "scored")
PAIR, JUDGED, CHAT, ASKED, TEXT, DOCUMENT, SCORED = CONTENTS
_RATED = keys.both(keys.has("prompt", "responses"), scored.is_rated)
_LISTED = keys.by_names(keys.one_of_each(scored.LISTS, rounds.ASKED))(scored.has_scored_list)
_LIST = ("prompt", "responses", "scores")
DATASET_FORMATS: tuple[DatasetFormat, ...] = (
    DatasetFormat(
        "preference",
        PAIR,
        ("context", *_PAIR),
        keys.both(keys.has("context", *_PAIR), keys.is_context),
        read.context_pair("context"),
    ),
    DatasetFormat(
        "sharegpt", PAIR, (_TALK, *_PAIR), keys.has(_TALK, *_PAIR), read.context_pair(_TALK)
    ),
    DatasetFormat(
        "alpaca",
        PAIR,
        ("instruction", *_PAIR),
        keys.has("instruction", *_PAIR),
        rounds.instruction_pair,
    ),
    DatasetFormat(
        "rm_static", PAIR, ("prompt", "response", *_PAIR), _RM_STATIC, rounds.rm_static_pair
    ),
    DatasetFormat(
        "trl",
        PAIR,
        ("prompt", *_PAIR),
        keys.both(keys.has(*_PAIR), keys.is_asked),
        rounds.prompt_pair,
    ),
    DatasetFormat("trl", PAIR, _PAIR, keys.has(chosen=list, rejected=list), read.whole_pair),
    DatasetFormat("hh_rlhf", PAIR, _PAIR, keys.has(*_PAIR), read.whole_pair),
    DatasetFormat(
        "ms_swift",
        PAIR,
        ("messages", "rejected_response"),
        keys.both(keys.has("messages", "rejected"), keys.no_pair),
        rounds.messages_pair("messages"),
    ),
    DatasetFormat(
        "pku",
        PAIR,
        ("prompt", *scored.PKU),
        keys.has("prompt", *scored.PKU),
        scored.voted(scored.PKU),
    ),
    DatasetFormat(
        "shp",
        PAIR,
        ("history", *scored.SHP),
        keys.has("history", *scored.SHP),
        scored.voted(scored.SHP, "history"),
    ),
    DatasetFormat(
        "helpsteer",
        PAIR,
        ("prompt", *scored.HELPSTEER2),
        keys.has("prompt", *scored.HELPSTEER2),
        scored.voted(scored.HELPSTEER2),
    ),
    DatasetFormat(
        "helpsteer",
        PAIR,
        ("context", *scored.HELPSTEER3),
        keys.has("context", *scored.HELPSTEER3),
        scored.voted(scored.HELPSTEER3, "context"),
    ),
    DatasetFormat(
        "helpsteer",
        PAIR,
        ("prompt", "response", "helpfulness"),
        _RATED,
        scored.rated_pair,
    ),
    DatasetFormat("scored_responses", PAIR, _LIST, _LISTED, scored.scored_list),
    DatasetFormat(
        "kto", JUDGED, _JUDGED, keys.has("prompt", "label", completion=dict), read.judged
    ),
    DatasetFormat("trl", JUDGED, _JUDGED, keys.has(*_JUDGED), read.judged),
    DatasetFormat(
        "messages",
        JUDGED,
        ("messages", "label"),
        keys.both(keys.has("messages"), keys.ends_judged("messages")),
        read.judged_messages("messages"),
    ),
    DatasetFormat(
        "sharegpt",
        JUDGED,
        (_TALK, "label"),
        keys.both(keys.has(_TALK), keys.ends_judged(_TALK)),
        read.judged_messages(_TALK),
    ),
    DatasetFormat(
        "question_answer",
        JUDGED,
        ("prompt", "response", "label"),
        keys.is_judged_round,
        rounds.judged_round,
    ),
    DatasetFormat(
        "rl_example", ASKED, ("messages", "gt_answer"), keys.has(messages=dict), read.rl_example
    ),
    DatasetFormat(
        "openai",
        CHAT,
        ("messages",),
        keys.both(keys.has("messages"), keys.is_openai, keys.not_ends_judged("messages")),
        read.listed("messages"),
    ),
    DatasetFormat(
        "messages",
        CHAT,
        ("messages",),
        keys.both(keys.has("messages"), keys.not_ends_judged("messages")),
        read.listed("messages"),
    ),
    DatasetFormat("message_list", CHAT, (), is_message_list, read.listed("messages")),
    DatasetFormat(
        "firefly",
        CHAT,
        (_TALK,),
        keys.both(keys.has(_TALK), keys.is_rounds_list(_TALK)),
        rounds.paired_rounds(_TALK),
    ),
    DatasetFormat(
        "sharegpt",
        CHAT,
        (_TALK,),
        keys.both(keys.has(_TALK), keys.no_pair, keys.not_ends_judged(_TALK)),
        read.listed(_TALK),
    ),
    DatasetFormat(
        "alpaca",
        CHAT,
        ("instruction", "output"),
        keys.both(keys.has("instruction", "output"), keys.not_judged),
        rounds.alpaca,
    ),
    DatasetFormat(
        "alpaca",
        ASKED,
        ("instruction",),
        keys.both(keys.has("instruction"), lambda row: not keys.is_round(row)),
        rounds.alpaca,
    ),
    DatasetFormat(
        "source_target", TEXT, ("source", "Target"), keys.is_source_target, read.source_target
    ),
    DatasetFormat("text", TEXT, ("text",), keys.is_text, read.plain_text),
    DatasetFormat(
        "trl",
        CHAT,
        _ROUND,
        keys.both(keys.has(*_ROUND), keys.not_labeled),
        read.prompt_and_completion,
    ),
    DatasetFormat(
        "oasst",
        CHAT,
        ("prompt.replies",),
        keys.both(keys.has("prompt"), trees.is_tree),
        trees.threads,
    ),
    DatasetFormat(
        "oasst",
        PAIR,
        ("prompt.replies",),
        keys.both(keys.has("prompt"), trees.is_tree),
        trees.ranked_replies,
    ),
    DatasetFormat(
        "glaive", CHAT, ("system", "chat"), keys.both(keys.has("chat"), is_glaive), glaive
    ),
    DatasetFormat(
        "xlam",
        CHAT,
        ("query", "tools", "answers"),
        keys.both(
            keys.has("tools", "answers"), keys.is_asked, lambda row: rounds.is_calls(row["answers"])
        ),
        rounds.called,
    ),
    DatasetFormat(
        "firefly",
        CHAT,
        ("conversation",),
        keys.both(keys.has("conversation"), keys.is_rounds_list("conversation")),
        rounds.paired_rounds("conversation"),
    ),
    DatasetFormat(
        "sharegpt",
        CHAT,
        ("conversation",),
        keys.both(keys.has("conversation"), keys.not_ends_judged("conversation")),
        read.listed("conversation"),
    ),
    DatasetFormat(
        "helpsteer",
        CHAT,
        ("prompt", "response", "helpfulness"),
        _RATED,
        scored.best_rated,
    ),
    DatasetFormat(
        "question_answer", ASKED, ("question", "answer"), keys.is_truth_alone, rounds.asked_alone
    ),
    DatasetFormat(
        "question_answer",
        CHAT,
        ("prompt", "response"),
        keys.is_unjudged_round,
        rounds.one_round,
    ),
    DatasetFormat("trl", ASKED, ("prompt",), keys.has(prompt=list), rounds.asked_alone),
    DatasetFormat("plain", ASKED, ("prompt",), keys.is_plain, rounds.plain),
    DatasetFormat("document", DOCUMENT, ("text",), keys.is_document, read.document),
    DatasetFormat("helpsteer", SCORED, ("prompt", "response", RATING), _RATED, scored.each_rated),
    DatasetFormat("scored_responses", SCORED, _LIST, _LISTED, scored.each_scored),
)
MOST_MARGIN = 1e38  # as fp32, in which rows hold it
SYSTEMS = ("system", "system_prompt", "system_message")
TOOLS = ("tools", "functions")
_SYSTEMS = frozenset(SYSTEMS)
_SOURCES = frozenset(SOURCES)
_TOOLS = frozenset(TOOLS)
_BESIDE_TESTS = tuple(name for names in TESTS.values() for name in names)
EXTRAS = frozenset(
    (*SYSTEMS, *TOOLS, *TRUTHS, *TESTS, *_BESIDE_TESTS, *SOURCES)
    + ("category", "gt_answer", "test_cases", "margin", "weight")
)
FORMATS = tuple(dict.fromkeys(format.name for format in DATASET_FORMATS))
FORMATS_OF = {
    type: tuple(dict.fromkeys(format.name for format in DATASET_FORMATS if type in format.types))
    for type in DATA_TYPES
}


def read_row(
    type: str, row: Any, format: str | None = None, layout: Layout | None = None
) -> SourceRow:
    """``row`` (decoded JSON, or a line of text) as data of ``type``, its format recognized or
    given by name. ``layout``: what columns of other names are.

    Raises RowError: wrong_type when it has a format of another type, wrong_keys with the nearest
    format when it has none.
    """
    data_type = DATA_TYPES[type]
    if isinstance(row, str) and data_type.templated:
        row = _opened(row)
    names: dict[str, str] = {}
    use = None
    if layout and isinstance(row, dict):
        row, names, use = renamed(row, layout)
    elif layout:
        use = ColumnUse(layout.hidden)
    found_format = _match(type, row, format)
    if found_format is None:
        found_format, row, names = _respelled(type, row, format, names)
    if not isinstance(row, dict):
        row = {"messages": row} if isinstance(row, list) else {"prompt": row}
    elif found_format.holds == CHAT and not JUDGING.isdisjoint(row) and not data_type.scored:
        _check_not_turned_down(type, row)
    fields = Fields(row, use or ColumnUse(), names=names)
    found = found_format.read(fields)
    found.format = found_format.name
    for one in found.branches:
        one.format = found_format.name
    if not data_type.supervised:
        fields.unread(*fields.answers)
    if not EXTRAS.isdisjoint(fields):
        _add_extras(found, fields, data_type.columns | data_type.optional_columns)
    if data_type.scored:
        add_scores(found, fields)
    said = _turns(found)
    data_type.finish(found)
    for one in found.branches:
        data_type.finish(one)
    if found.branches and not data_type.supervised:  # the branches of a tree part at responses
        found.branches = _unlike(found)
    fields.close()
    if said > _turns(found) and data_type.supervised:
        found.unused["turns after the last response"] = False
    if fields.use.left:
        truth = not data_type.supervised and found.gt_answer is not None
        found.unused |= fields.use.unused(_texts(found), data_type.supervised, truth)
    return found


def _unlike(row: SourceRow) -> list[SourceRow]:
    """The branches with prompts that are not there before."""
    before = [row.messages]
    kept = []
    for one in row.branches:
        if one.messages not in before:
            before.append(one.messages)
            kept.append(one)
    return kept


def _check_not_turned_down(type: str, row: dict) -> None:
    if DATA_TYPES[type].supervised and (why := read.turned_down(row)):
        key = why.partition(" ")[0]
        raise RowError("judged_bad", f"{why}; if it judges no response: --columns {key}=")


def _turns(row: SourceRow) -> int:
    return len(row.messages) + len(row.chosen) + len(row.rejected)


def format_of(row: Any) -> DatasetFormat | None:
    """The first format, of whatever type, that ``row`` has."""
    return next((format for format in DATASET_FORMATS if format.matches(row)), None)


def _opened(row: str) -> Any:
    """The row that a text writes as JSON, as a file that was encoded twice holds it; else the
    text."""
    if row[:1] not in ("{", "["):
        return row
    found = decoded(row)
    if isinstance(found, dict) and format_of(found) is not None:
        return found
    return found if is_message_list(found) else row


def _texts(row: SourceRow) -> list[str]:
    """Everything that the row says."""
    turns = (*row.messages, *row.chosen, *row.rejected)
    texts = [turn["content"] for turn in turns]
    texts += [turn_text(turn) for turn in turns if len(turn) > 2]
    more = (row.completion, row.text, row.gt_answer)
    return texts + [text for text in more if text is not None]


@lru_cache
def _candidates(type: str, name: str | None) -> tuple[DatasetFormat, ...]:
    found = [
        format for format in DATASET_FORMATS if type in format.types and name in (None, format.name)
    ]
    # Of lists of scored responses, what reads all of them comes before what takes two or one.
    return tuple(sorted(found, key=lambda format: format.holds != SCORED))


@lru_cache(maxsize=1024)
def _within_reach(type: str, name: str | None, names: tuple[str, ...]) -> tuple[DatasetFormat, ...]:
    """The candidates that a row with columns of these names may have; most rows of a file have the
    same."""
    return tuple(
        format for format in _candidates(type, name) if keys.may_match(format.matches, names)
    )


def _match(type: str, row: Any, name: str | None) -> DatasetFormat | None:
    candidates = (
        _within_reach(type, name, tuple(row)) if isinstance(row, dict) else _candidates(type, name)
    )
    for format in candidates:
        if format.matches(row):
            return format
    return None


def _respelled(
    type: str, row: Any, name: str | None, names: dict[str, str]
) -> tuple[DatasetFormat, Any, dict[str, str]]:
    """The format, the row under the names that the format knows, and as what the file spells
    them."""
    spelled, others = keys.respelled(row)
    if others and (found := _match(type, spelled, name)):
        return found, spelled, others | names
    other = format_of(row) or (format_of(spelled) if others else None)
    raise wrong_row(type, row, name, _candidates(type, name), other, DATASET_FORMATS)


def _add_extras(found: SourceRow, row: Fields, columns: dict[str, Any]) -> None:
    """The columns that any format may have; those that rows of this type have no place for stay
    unread."""
    rows = (found, *found.branches)
    if not _SYSTEMS.isdisjoint(row):
        _add_system(found, row)
    if not _TOOLS.isdisjoint(row) and found.tools is None and (key := row.first(TOOLS)) is not None:
        tools = tools_of(row[key], key)
        for one in rows:
            one.tools = tools
    if row.peek("category") not in (None, ""):
        category = str(row["category"])
        for one in rows:
            one.category = category
    has_truth = "gt_answer" in columns
    if has_truth and not _SOURCES.isdisjoint(row):  # read, and said so, where a run asks for it
        source = next((row.peek(name) for name in SOURCES if row.peek(name)), None)
        for one in rows:
            one.source = source if isinstance(source, str) else None
    if has_truth or row.peek("gt_answer") or row.peek("test_cases"):
        truth = ground_truth(row)
        for one in rows:
            one.gt_answer = truth
        if not has_truth:
            row.unread("gt_answer", "test_cases")
    if row.peek("margin") not in (None, ""):
        found.margin = _margin(row["margin"])
        if "margin" not in columns:
            row.unread("margin")
    if "weight" in columns and row.peek("weight") not in (None, ""):
        found.weight = _weight(row["weight"])


def _add_system(found: SourceRow, row: Fields) -> None:
    """A system message for a row whose messages have none."""
    if found.messages and found.messages[0]["role"] != "system":
        if system := row.take(SYSTEMS):
            said = {"role": "system", "content": text(system, "system")}
            for one in (found, *found.branches):
                one.messages = [said, *one.messages]


def _weight(given: Any) -> float:
    weight = number_of(given)
    if not 0 <= weight < MOST_MARGIN:
        raise RowError(
            "bad_pair_weight", f"weight is {given!r:.60}, expected a number of 0 or more"
        )
    return weight


def _margin(given: Any) -> float:
    margin = number_of(given)
    if not abs(margin) < MOST_MARGIN:
        raise RowError("bad_margin", f"margin is {given!r:.60}, expected a number")
    return margin
