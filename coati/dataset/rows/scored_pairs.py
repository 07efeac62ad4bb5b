"""Pairs of responses that are told apart by scores, ranks or votes instead of by their columns."""

import math
from collections.abc import Callable
from typing import Any

from coati.dataset.rows.column_use import ColumnUse, Fields
from coati.dataset.rows.messages import Message, Messages, message, message_list, spoken
from coati.dataset.rows.numerals import number_of
from coati.dataset.rows.rounds import asked, asked_key
from coati.dataset.rows.row_errors import RowError
from coati.dataset.rows.source_row import (
    RATING,
    Judged,
    PartRow,
    SourceRow,
    rating_of,
    response_messages,
    turned_down,
)

LISTS = ("completions", "responses", "generations", "answers", "candidates")
SCORES = ("scores", "ratings", "rewards", "ranks", "rank")  # beside the list, one for each
# Inside an element of the list; the ranks count from the best.
SCORE = ("overall_score", "score", "rating", "reward", "fine_grained_score", "rank")
RANKS = ("rank", "ranks")
TEXT = ("response", "answer", "text", "completion", "content", "value")
# PKU-SafeRLHF, SHP and HelpSteer: two responses, and what tells which is better.
PKU = ("response_0", "response_1", "better_response_id")
SHP = ("human_ref_A", "human_ref_B", "labels")
HELPSTEER2 = ("response_1", "response_2", "preference_strength")
HELPSTEER3 = ("response1", "response2", "overall_preference")


def has_scored_list(row: Any) -> bool:
    """Whether ``row`` has a question and a list of responses with their scores."""
    if not isinstance(row, dict) or asked_key(row) is None:
        return False
    key = _list_key(row)
    return key is not None and (_beside(row) is not None or _inside(dict.get(row, key)) is not None)


def _list_key(row: dict) -> str | None:
    return next(
        (
            key
            for key in LISTS
            if isinstance(dict.get(row, key), list) and len(dict.get(row, key)) > 1
        ),
        None,
    )


def _beside(row: dict) -> str | None:
    return next((key for key in SCORES if isinstance(dict.get(row, key), list)), None)


def _inside(found: list) -> str | None:
    if not all(isinstance(one, dict) for one in found):
        return None
    return next((key for key in SCORE if any(one.get(key) is not None for one in found)), None)


def _scores(row: Fields) -> tuple[str, str, list[Any], list[float]]:
    """``(column of the list, name of the scores, responses, scores)``; a score is nan where there
    is none, and the higher the better."""
    key = _list_key(row)
    beside = _beside(row)
    name = beside or _inside(row.peek(key))
    found = row.answer(key)
    scores = row[beside] if beside else [one.get(name) for one in found]
    if len(scores) != len(found):
        raise RowError("bad_scores", f"{len(scores)} {name} for {len(found)} {key}")
    numbers = [_number(score, name) for score in scores]
    return key, name, found, [-number for number in numbers] if name in RANKS else numbers


def each_scored(row: Fields) -> SourceRow:
    """UltraFeedback, Nectar and kin: every response that has a score, the ones after the first as
    branches."""
    key, name, found, numbers = _scores(row)
    usable = [k for k, number in enumerate(numbers) if math.isfinite(number)]
    if not usable:
        raise RowError("no_score", f"none of the {name} is a number")
    for k, one in enumerate(found):
        if k not in usable:
            row.use.leave(f"{key} without one of {name}", one)
    return _branched(row, [(_one(row, key, found[k], name), numbers[k]) for k in usable])


def each_rated(row: Fields) -> SourceRow:
    """HelpSteer: every response to one prompt with its rating, as :func:`each_scored`."""
    found = row.answer("responses")
    return _branched(row, [(_rated(row, one), float(rating_of(one) or 0)) for one in found])


def _branched(row: Fields, responses: list[tuple[Messages, float]]) -> SourceRow:
    first, *rest = [
        SourceRow(messages=[*asked(row), *said], reward=number) for said, number in responses
    ]
    first.branches = rest
    return first


def scored_list(row: Fields) -> SourceRow:
    """UltraFeedback, Nectar and kin: of the list the response with the best score, and the one with
    the worst."""
    key, name, found, numbers = _scores(row)
    usable = [k for k, number in enumerate(numbers) if math.isfinite(number)]
    group = [Judged(found[k], key, name, numbers[k]) for k in usable]
    if len({numbers[k] for k in usable}) < 2:
        beside = _beside(row)
        scores = row[beside] if beside else [one.get(name) for one in found]
        undecided = f"no two of the {name} differ: {scores!r:.60}"
        return SourceRow(messages=asked(row), undecided=undecided, group=group)
    best = max(usable, key=lambda k: numbers[k])
    worst = min(usable, key=lambda k: numbers[k])
    for k, one in enumerate(found):
        if k not in (best, worst):
            row.use.leave(f"{key} between the best and the worst", one)
    chosen, rejected = (_one(row, key, found[k], name) for k in (best, worst))
    return SourceRow(messages=asked(row), chosen=chosen, rejected=rejected, group=group)


def judged_messages(judged: Judged) -> tuple[Messages, dict[str, bool]]:
    """A response of :attr:`~coati.dataset.rows.source_row.SourceRow.group`, and what of it is not
    read, as of :meth:`~coati.dataset.rows.column_use.ColumnUse.unused`. Raises RowError for what is
    none."""
    use = ColumnUse()
    said = _one(Fields({}, use), judged.key, judged.found, judged.name)
    return said, use.unused((str(one.get("content")) for one in said), True)


def _number(score: Any, name: str) -> float:
    if score is None or (isinstance(score, str) and score.strip().upper() in ("", "N/A", "NONE")):
        return math.nan
    number = number_of(score)
    if math.isnan(number) and not isinstance(score, float):
        raise RowError("bad_scores", f"{name} holds {score!r:.60}, expected a number")
    return number


def _one(row: Fields, key: str, found: Any, name: str) -> Messages:
    """An element of the list as a response."""
    if isinstance(found, str):
        return [spoken("assistant", found, key, row.use)]
    if isinstance(found, list):
        return message_list(found, key, row.use, f"{key}[][]")
    if not isinstance(found, dict):
        raise RowError("content_not_text", f"{key} holds {type(found).__name__}")
    if "role" in found or "from" in found:
        kept = {k: v for k, v in found.items() if k != name}
        return [message(kept, key, row.use, f"{key}[]")]
    one = Fields(found, row.use, f"{key}[].")
    one.get(name)
    text_key = one.first(TEXT)
    if text_key is None or not isinstance(one.peek(text_key), str):
        raise RowError("wrong_keys", f"{key} holds an object without {', '.join(TEXT)}")
    said: list[Message] = [spoken("assistant", one[text_key], key, row.use)]
    one.close()
    return said


def is_rated(row: dict) -> bool:
    """Whether the responses of ``row`` were rows of their own, with a rating each (HelpSteer)."""
    found = row["responses"]
    return isinstance(found, list) and bool(found) and all(isinstance(o, PartRow) for o in found)


def rated_pair(row: Fields) -> SourceRow:
    """HelpSteer: of the responses to one prompt the one that is rated best, and the one that is
    rated worst."""
    found = row.answer("responses")
    best, worst = _ends(found)
    if best == worst:
        said = f"{RATING} {rating_of(found[0])}"
        undecided = f"all {len(found)} responses have {said}" if found[1:] else "one response alone"
        return SourceRow(messages=asked(row), undecided=undecided)
    for k, one in enumerate(found):
        if k not in (best, worst):
            row.use.leave("response between the best and the worst", one["response"])
    chosen, rejected = (_rated(row, found[k]) for k in (best, worst))
    return SourceRow(messages=asked(row), chosen=chosen, rejected=rejected)


def best_rated(row: Fields) -> SourceRow:
    """HelpSteer: of the responses to one prompt the one that is rated best. A bad one is not
    learned, even if there is no better."""
    found = row.answer("responses")
    best, _ = _ends(found)
    if why := turned_down(found[best]):
        more = f" (the best of {len(found)} responses)" if found[1:] else ""
        raise RowError("judged_bad", f"{why}{more}; if it judges no response: --columns {RATING}=")
    for k, one in enumerate(found):
        if k != best:
            row.use.leave("response beside the best", one["response"])
    return SourceRow(messages=asked(row) + _rated(row, found[best]))


def _ends(found: list[PartRow]) -> tuple[int, int]:
    """Which is rated best and which worst, the first of several; the same where none differs."""
    ratings = [rating_of(one) or 0 for one in found]
    return ratings.index(max(ratings)), ratings.index(min(ratings))


def _rated(row: Fields, found: PartRow) -> Messages:
    one = Fields(found, row.use)
    one.get(RATING)
    said = response_messages(one, "response")
    one.close()
    return said


def voted(
    names: tuple[str, str, str], question: str | None = None
) -> Callable[[Fields], SourceRow]:
    """A pair in two columns and a third that tells which is better: its index, 1 where it is the
    first (SHP), or a preference that is negative for the first (HelpSteer)."""
    first, second, vote = names

    def read(row: Fields) -> SourceRow:
        found = row[vote]
        number = number_of(found)
        if vote == SHP[2]:
            number = {1.0: -1.0, 0.0: 1.0}.get(number, math.nan)
        elif vote == PKU[2]:
            number = {0.0: -1.0, 1.0: 1.0}.get(number, math.nan)
        if not math.isfinite(number):
            raise RowError("bad_scores", f"{vote} is {found!r:.60}, which names no response")
        messages = asked(row) if question is None else _asked_under(row, question)
        if number == 0:
            return SourceRow(messages=messages, undecided=f"{vote} is {found!r:.60}")
        better, worse = (first, second) if number < 0 else (second, first)
        chosen = response_messages(row, better)
        rejected = response_messages(row, worse)
        return SourceRow(messages=messages, chosen=chosen, rejected=rejected)

    return read


def _asked_under(row: Fields, key: str) -> Messages:
    found = row[key]
    if isinstance(found, list):
        return message_list(found, key, row.use, f"{key}[]")
    if not isinstance(found, str):
        raise RowError("content_not_text", f"{key} holds {type(found).__name__}")
    return [{"role": "user", "content": found}]
