"""How a chat template writes calls of tools, learned from what it renders for calls with known
names, keys and values, so that what a model writes is read back as the template would write it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from coati.dataset.chat.call_bodies import (
    BareKeysBody,
    Body,
    JsonBody,
    NamedJsonBody,
    PairsBody,
    PythonBody,
)
from coati.dataset.chat.call_marks import Mark, common_beginning

# What a template writes for (content, calls), each (name, arguments); None where it refuses.
# The text begins where a response does and ends before what ends one.
Write = Callable[[str, Sequence[tuple[str, dict[str, Any]]]], str | None]

FIRST = "zqalpha"
SECOND = "zqbeta"
NAMES = (FIRST, SECOND)
KEYS = ("zqkeyone", "zqkeytwo")
VALUES = ("zqvalueone", "zqvaluetwo")
NUMBER = 73519
IDS = ("zqid00001", "zqid00002")


@dataclass(frozen=True)
class CallFormat:
    """Calls of one template.

    Attributes:
        opening: before the first call, nothing in it where ``anchored``.
        between: behind a call, where another follows; None where a template writes one alone.
        closing: behind the last.
        body: how the call itself is written.
        anchored: nothing but the call itself tells that it is one, so it is read only where a
            response begins with the call of a known function.
        begins: the text before the name of the first call, as the template writes it.
        middle: the text between the name and the arguments, "" where that is not one text.
    """

    opening: Mark
    between: Mark | None
    closing: Mark
    body: Body
    anchored: bool
    begins: str
    middle: str

    @cached_property
    def marks(self) -> str:
        """All texts around calls, in which control tokens may stand."""
        between = self.between.text if self.between else ""
        inner = "".join(
            each.text for each in vars(self.body).values() if isinstance(each, Mark)
        ) + getattr(self.body, "quote", "")
        return f"{self.opening.text}\n{between}\n{self.closing.text}\n{inner}\n{self.begins}"

    @cached_property
    def own_closing(self) -> Mark:
        """What closes one call of several."""
        between = self.between.text if self.between else ""
        return Mark(common_beginning(between, self.closing.text))

    def forced(self, name: str | None) -> str:
        """The beginning of a response that is a call, of ``name`` or of any function."""
        return self.opening_text if name is None else f"{self.begins}{name}{self.middle}"

    @cached_property
    def opening_text(self) -> str:
        return self.opening.text if not self.anchored else self.begins


def learn(write: Write) -> CallFormat | None:
    """The format of the template that ``write`` renders; None where it writes no calls that can be
    told from other text."""
    one = write("", [(FIRST, {KEYS[0]: VALUES[0]})])
    if one is None or FIRST not in one:
        return None
    two = write("", [(FIRST, {KEYS[0]: VALUES[0]}), (SECOND, {KEYS[0]: VALUES[1]})])
    if two is not None and (SECOND not in two or FIRST not in two):
        two = None
    for form in (_json, _named_json, _python, _bare_keys, _pairs):
        try:
            found = form(write, one, two)
        except (ValueError, StopIteration):  # its marks do not stand where this form has them
            continue
        if found is not None:
            return found
    return None


def _made(
    one: str,
    two: str | None,
    start: int,
    end: int,
    second: tuple[int, int] | None,
    body: Body,
    middle: str = "",
) -> CallFormat:
    """The format with its body at ``start`` to ``end`` of ``one`` and, first and second, of
    ``two``."""
    opening = Mark(one[:start], IDS)
    between = None
    if two is not None and second is not None:
        between = Mark(two[second[0] : second[1]], IDS)
    return CallFormat(
        opening,
        between,
        Mark(one[end:], IDS),
        body,
        anchored=not (opening.distinct and opening.first),
        begins=one[: one.index(FIRST)],
        middle=middle,
    )


def _objects(text: str) -> list[tuple[int, int, Any]]:
    """The outermost JSON values in ``text`` that hold something: (start, end, value)."""
    found = []
    decoder = json.JSONDecoder()
    place = 0
    while place < len(text):
        if text[place] in "{[":
            try:
                value, end = decoder.raw_decode(text, place)
            except ValueError:
                place += 1
                continue
            if value:
                found.append((place, end, value))
                place = end
                continue
        place += 1
    return found


def _path(value: Any, wanted: Callable[[Any], bool], path: tuple[str, ...] = ()) -> Any:
    """Where in objects of objects something is that is ``wanted``; None: nowhere."""
    if wanted(value):
        return path
    if isinstance(value, dict):
        for key, inner in value.items():
            if (found := _path(inner, wanted, (*path, key))) is not None:
                return found
    return None


def _is_arguments(value: Any) -> bool:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return False
    return isinstance(value, dict) and list(value) == [KEYS[0]]


def _json(write: Write, one: str, two: str | None) -> CallFormat | None:
    for start, end, value in _objects(one):
        call = value[0] if isinstance(value, list) else value
        name = _path(call, lambda each: each == FIRST)
        arguments = _path(call, _is_arguments)
        if not name or not arguments:
            continue
        listed = isinstance(value, list)
        body = JsonBody(name, arguments, _path(call, lambda each: each in IDS), listed)
        places = _objects(two) if two is not None and not listed else []
        own = [(s, e) for s, e, each in places if _path(each, lambda v: v in NAMES)]
        second = (own[0][1], own[1][0]) if len(own) == 2 else None
        after = one.index(FIRST, start) + len(FIRST)
        inside = one.find("{", after)
        middle = one[after:inside] if KEYS[0] in one[inside:end] else ""
        return _made(one, two, start, end, second, body, middle)
    return None


def _named_json(write: Write, one: str, two: str | None) -> CallFormat | None:
    places = [(s, e) for s, e, value in _objects(one) if _is_arguments(value)]
    name = one.index(FIRST)
    if not places or places[0][0] < name:
        return None
    (start, end), *_ = places
    middle = one[name + len(FIRST) : start]
    second = None
    if two is not None:
        first_end = next(e for _, e, value in _objects(two) if _is_arguments(value))
        second = (first_end, two.index(SECOND))
    ids = IDS if any(each in middle for each in IDS) else ()
    given = "" if ids else middle
    return _made(one, two, name, end, second, NamedJsonBody(Mark(middle, ids)), given)


def _around(text: str) -> tuple[str, str] | None:
    """The texts from the name to the first key, and from there to the value; None where they do
    not stand in this order."""
    name = text.find(FIRST)
    key = text.find(KEYS[0], name)
    value = text.find(VALUES[0], key)
    if min(name, key, value) < 0:
        return None
    return text[name + len(FIRST) : key], text[key + len(KEYS[0]) : value]


def _python(write: Write, one: str, two: str | None) -> CallFormat | None:
    around = _around(one)
    if around is None or around[0].strip() != "(" or around[1].strip() not in ('="', "='"):
        return None
    name = one.index(FIRST)
    end = one.index(")", name) + 1
    before = one[:name].rstrip()
    listed = before.endswith("[") and one[end:].lstrip().startswith("]")
    if listed:
        name = len(before) - 1
        end = one.index("]", end) + 1
    second = None
    if two is not None and not listed:
        second = (two.index(")", two.index(VALUES[0])) + 1, two.index(SECOND))
    return _made(one, two, name, end, second, PythonBody(listed), around[0])


def _bare_keys(write: Write, one: str, two: str | None) -> CallFormat | None:
    around = _around(one)
    if around is None or around[0].strip() != "{" or not around[1].startswith(":"):
        return None
    quote = around[1][1:].strip()
    value_end = one.index(VALUES[0]) + len(VALUES[0])
    if not quote or not one.startswith(quote, value_end):
        return None
    end = one.index("}", value_end) + 1
    second = None
    if two is not None:
        second = (two.index("}", two.index(VALUES[0])) + 1, two.index(SECOND))
    return _made(one, two, one.index(FIRST), end, second, BareKeysBody(quote), around[0])


def _pairs(write: Write, one: str, two: str | None) -> CallFormat | None:
    pair = dict(zip(KEYS, VALUES, strict=True))
    both = write("", [(FIRST, pair)])
    none = write("", [(FIRST, {})])
    number = write("", [(FIRST, {KEYS[0]: NUMBER})])
    around = _around(one)
    if around is None or both is None or not all(each in both for each in (*KEYS, *VALUES)):
        return None
    name = one.index(FIRST)
    tail = one[one.index(VALUES[0]) + len(VALUES[0]) :]
    next_key = both[both.index(VALUES[0]) + len(VALUES[0]) : both.index(KEYS[1])]
    closing = common_beginning(next_key, tail)
    if not closing.strip():
        return None
    # From the last value to the next name: the end of one call and the opening of another.
    call_tail = tail
    second = None
    if two is not None:
        gap_start = two.index(VALUES[0]) + len(VALUES[0])
        gap = two[gap_start : two.index(SECOND)]
        call_tail = common_beginning(gap, tail)
        second = (gap_start + len(call_tail), two.index(SECOND))
    as_json = around[1]
    if number is not None and KEYS[0] in number and str(NUMBER) in number:
        as_json = number[number.index(KEYS[0]) + len(KEYS[0]) : number.index(str(NUMBER))]
    ends = call_tail[len(closing) :]
    empty = ends
    if none is not None and FIRST in none:
        after = none[none.index(FIRST) + len(FIRST) :]
        rest = tail[len(call_tail) :]
        empty = after.removesuffix(rest) if rest else after
    body = PairsBody(
        opening=Mark(around[0]),
        between=Mark(next_key[len(closing) :]),
        as_text=Mark(around[1]),
        as_json=Mark(as_json),
        closing=Mark(closing),
        space=closing[: len(closing) - len(closing.lstrip())],
        ends=Mark(ends),
        empty=Mark(empty),
    )
    end = len(one) - len(tail) + len(call_tail)
    head = common_beginning(around[0], none[none.index(FIRST) + len(FIRST) :] if none else "")
    return _made(one, two, name, end, second, body, head)
