"""How the formats of rows are told apart: functions of a row that say whether it has what a format
needs. Every row meets many of them, so they are loops, and those marked :func:`by_names` are left
out by the names of a row's columns alone."""

from collections.abc import Callable, Collection
from typing import Any

from coati.dataset.rows import rounds
from coati.dataset.rows import source_row as read
from coati.dataset.rows.row_errors import ROW_ROLES

Matches = Callable[[Any], bool]
Names = Collection[str]


def by_names(may_match: Callable[[Names], bool]) -> Callable[[Matches], Matches]:
    """Mark a function of rows with what it says of every row whose columns have these names: True
    where it depends on what the columns hold."""

    def mark(matches: Matches) -> Matches:
        matches.may_match = may_match
        return matches

    return mark


def one_of_each(*groups: Names) -> Callable[[Names], bool]:
    """Whether one of each group of names is there."""
    return lambda names: not any(frozenset(group).isdisjoint(names) for group in groups)


def may_match(matches: Matches, names: Names) -> bool:
    """Whether ``matches`` may be true of an object with columns of these ``names``."""
    return getattr(matches, "may_match", lambda _: True)(names)


def has(*keys: str, **kinds: type | tuple) -> Matches:
    """Whether a row has ``keys``, not null, those named in ``kinds`` being of that kind."""
    wanted = (*keys, *kinds)

    @by_names(frozenset(wanted).issubset)
    def matches(row: Any) -> bool:
        if not isinstance(row, dict):
            return False
        for key in wanted:
            if row.get(key) is None:
                return False
        for key, kind in kinds.items():
            if not isinstance(row[key], kind):
                return False
        return True

    return matches


def both(*all_of: Matches) -> Matches:
    """Whether all say so; the first one that the row is an object with the columns of the rest."""

    @by_names(lambda names: all(may_match(one, names) for one in all_of))
    def matches(row: Any) -> bool:
        for one in all_of:
            if not one(row):
                return False
        return True

    return matches


def not_judged(row: dict) -> bool:
    # With a label the response may be a bad one, which supervised training must not learn.
    return read.labeled(row) is None


def not_labeled(row: dict) -> bool:
    # A label of any kind beside prompt and completion judges it, though perhaps in an unknown word.
    return row.get("label") is None and not_judged(row)


def ends_judged(key: str) -> Callable[[dict], bool]:
    """Whether a label is for the last message of the list under ``key``, a response."""

    @by_names(one_of_each(read.JUDGING))
    def judged(row: dict) -> bool:
        if read.JUDGING.isdisjoint(row) or read.judgment(row) is None:
            return False
        found = row[key]
        last = found[-1] if isinstance(found, list) and found else None
        role = (last.get("role") or last.get("from")) if isinstance(last, dict) else None
        return isinstance(role, str) and ROW_ROLES.get(role.lower()) == "assistant"

    return judged


def not_ends_judged(key: str) -> Callable[[dict], bool]:
    judged = ends_judged(key)
    return lambda row: read.JUDGING.isdisjoint(row) or read.labeled(row) is None or not judged(row)


@by_names(lambda names: "target" in {str(name).lower() for name in names})
def is_source_target(row: Any) -> bool:
    if not isinstance(row, dict):
        return False
    names = {str(key).lower() for key in row}
    return "target" in names and ("source" in names or not is_asked(row))


@by_names(one_of_each(read.QUESTIONS))
def is_plain(row: Any) -> bool:
    return isinstance(row, str) or read.first_question(row) is not None


# Keys that make a conversation of a row, whatever text is beside them.
_NOT_BESIDE_TEXT = (
    *("messages", "conversations", "instruction", "completion", "label", "chosen", "rejected"),
    *("role", "from", "parent_id", "message_id"),  # a single message of a tree
    *(key for key in read.QUESTIONS if key != "text"),
)


@by_names(one_of_each(("text",)))
def is_text(row: Any) -> bool:
    """A text and nothing beside it that a conversation would be made of."""
    found = isinstance(row, dict) and isinstance(row.get("text"), str)
    return found and not any(row.get(key) is not None for key in _NOT_BESIDE_TEXT)


@by_names(one_of_each(read.TEXTS))
def is_document(row: Any) -> bool:
    return isinstance(row, str) or read.text_column(row) is not None


@by_names(one_of_each(rounds.ASKED))
def is_asked(row: dict) -> bool:
    return rounds.asked_key(row) is not None


def is_context(row: dict) -> bool:
    """Whether ``context`` holds the conversation, not a text beside a question."""
    return isinstance(row["context"], list) or not is_asked(row)


def no_pair(row: dict) -> bool:
    # With two responses after it, it is the context of a preference.
    return not (row.get("chosen") is not None and row.get("rejected") is not None)


_ROUND = one_of_each(rounds.ASKED, rounds.RESPONSES)


@by_names(_ROUND)
def is_round(row: Any) -> bool:
    return isinstance(row, dict) and is_asked(row) and rounds.response_key(row) is not None


@by_names(_ROUND)
def is_judged_round(row: Any) -> bool:
    return is_round(row) and read.judgment(row) is not None


@by_names(_ROUND)
def is_unjudged_round(row: Any) -> bool:
    if not is_round(row):
        return False
    return not_labeled(row) if rounds.response_key(row) == "completion" else not_judged(row)


@by_names(_ROUND)
def is_truth_alone(row: Any) -> bool:
    """Whether what answers the question is a reference, not a response to leave out."""
    return is_round(row) and rounds.response_key(row) in ("solution", "answer")


def is_openai(row: dict) -> bool:
    found = row["messages"]
    if isinstance(found, list):
        for one in found:
            if isinstance(one, dict) and one.get("role") is not None:
                return True
    return False


def is_rounds_list(key: str) -> Callable[[dict], bool]:
    return lambda row: (
        isinstance(row[key], list)
        and bool(row[key])
        and all(isinstance(one, dict) and not {"role", "from"} & one.keys() for one in row[key])
    )


# Other names of the columns of a pair, and of a question's.
RESPELLED = {
    "chosen_response": "chosen",
    "rejected_response": "rejected",
    "response_chosen": "chosen",
    "response_rejected": "rejected",
    "chosen_messages": "chosen",
    "rejected_messages": "rejected",
    "dialogue": "conversations",
    "dialog": "conversations",
    "complex_cot": "reasoning",
}


def respelled(row: Any) -> tuple[Any, dict[str, str]]:
    """``(row, names)``: with the names of columns in lower case, and under those that formats know;
    as what the file spells each that changed."""
    if not isinstance(row, dict):
        return row, {}
    made: dict[str, Any] = {}
    names: dict[str, str] = {}
    for key, value in row.items():
        lower = str(key).lower()
        name = RESPELLED.get(lower, lower)
        if name in row or name in made:
            name = key
        if name != key:
            names[name] = key
        made[name] = value
    return made, names
