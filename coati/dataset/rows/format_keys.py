"""How the formats of rows are told apart: functions of a row that say whether it has what a format
needs."""

from collections.abc import Callable
from typing import Any

from coati.dataset.rows import rounds
from coati.dataset.rows import source_row as read
from coati.dataset.rows.row_errors import ROW_ROLES


def has(*keys: str, **kinds: type | tuple) -> Callable[[Any], bool]:
    """Whether a row has ``keys``, not null, those named in ``kinds`` being of that kind."""
    wanted = (*keys, *kinds)

    def matches(row: Any) -> bool:
        if not isinstance(row, dict):
            return False
        for key in wanted:  # a loop, since every row meets most of the table
            if row.get(key) is None:
                return False
        return all(isinstance(row[key], kind) for key, kind in kinds.items())

    matches.needs = frozenset(wanted)
    return matches


def both(has: Callable[[Any], bool], *more: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """What :func:`has` says, and ``more``."""

    def matches(row: Any) -> bool:
        if not has(row):
            return False
        for one in more:  # a loop, as above
            if not one(row):
                return False
        return True

    matches.needs = has.needs
    return matches


def not_judged(row: dict) -> bool:
    # With a label the response may be a bad one, which supervised training must not learn.
    return read.labeled(row) is None


def not_labeled(row: dict) -> bool:
    # A label of any kind beside prompt and completion judges it, though perhaps in an unknown word.
    return row.get("label") is None and not_judged(row)


def ends_judged(key: str) -> Callable[[dict], bool]:
    """Whether a label is for the last message of the list under ``key``, a response."""

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


def is_source_target(row: Any) -> bool:
    if not isinstance(row, dict):
        return False
    names = {str(key).lower() for key in row}
    return "target" in names and ("source" in names or not is_asked(row))


def is_plain(row: Any) -> bool:
    return isinstance(row, str) or read.first_question(row) is not None


# Keys that make a conversation of a row, whatever text is beside them.
_NOT_BESIDE_TEXT = (
    *("messages", "conversations", "instruction", "completion", "label", "chosen", "rejected"),
    *("role", "from", "parent_id", "message_id"),  # a single message of a tree
    *(key for key in read.QUESTIONS if key != "text"),
)


def is_text(row: Any) -> bool:
    """A text and nothing beside it that a conversation would be made of."""
    found = isinstance(row, dict) and isinstance(row.get("text"), str)
    return found and not any(row.get(key) is not None for key in _NOT_BESIDE_TEXT)


def is_document(row: Any) -> bool:
    return isinstance(row, str) or read.text_column(row) is not None


def is_asked(row: dict) -> bool:
    return rounds.asked_key(row) is not None


def is_context(row: dict) -> bool:
    """Whether ``context`` holds the conversation, not a text beside a question."""
    return isinstance(row["context"], list) or not is_asked(row)


def no_pair(row: dict) -> bool:
    # With two responses after it, it is the context of a preference.
    return not (row.get("chosen") is not None and row.get("rejected") is not None)


def is_round(row: Any) -> bool:
    return isinstance(row, dict) and is_asked(row) and rounds.response_key(row) is not None


def is_unjudged_round(row: Any) -> bool:
    if not is_round(row):
        return False
    return not_labeled(row) if rounds.response_key(row) == "completion" else not_judged(row)


def is_truth_alone(row: Any) -> bool:
    """Whether what answers the question is a reference, not a response to leave out."""
    return is_round(row) and rounds.response_key(row) in ("solution", "answer")


def is_openai(row: dict) -> bool:
    found = row["messages"]
    return isinstance(found, list) and any(
        isinstance(m, dict) and m.get("role") is not None for m in found
    )


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
