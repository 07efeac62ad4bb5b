"""How calls of tools are written between their marks: as JSON, as a name before JSON, as pairs of
names and values, as Python, or with bare keys. Each form reads back what it writes."""

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from coati.dataset.chat.call_marks import Found, Mark, skip_space

NAME = re.compile(r"[\w./-]+")
# {function: {parameter: type in its schema}}
Types = Mapping[str, Mapping[str, str]]
_JSON_PARTS = re.compile(r'"(?:[^"\\]|\\.)*"|["{}\[\]]', re.DOTALL)
_PYTHON_PARTS = re.compile(r'"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\'|["\'{}()\[\]]', re.DOTALL)
_PYTHON_COMMAS = re.compile(_PYTHON_PARTS.pattern + "|,", re.DOTALL)
_KEY = re.compile(r"[\w.$-]+")
NULLABLE = "string or null"
_OPENING = "{[("
_CLOSING = "}])"
_CONSTANTS = {"true": True, "false": False, "null": None}


class Call(NamedTuple):
    """``id``: as the model wrote it, if it did."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None


class Incomplete(Exception):
    """The text ends within a call."""


class Unreadable(Exception):
    """No call stands here."""


class Body(Protocol):
    """``read`` gives the calls that begin at ``start``, several in a list, and where they end.
    ``final``: nothing follows ``text``. What it says of a text holds for every longer one."""

    def read(self, text: str, start: int, final: bool, types: Types) -> tuple[list[Call], int]:
        """Raises Incomplete, Unreadable."""


def _more(final: bool) -> Exception:
    return Unreadable() if final else Incomplete()


def _name(text: str, start: int, final: bool) -> tuple[str, int]:
    start = skip_space(text, start)
    matched = NAME.match(text, start)
    if matched is None:
        raise _more(final) if start == len(text) else Unreadable()
    if matched.end() == len(text) and not final:
        raise Incomplete
    return matched.group(), matched.end()


def _after(mark: Mark, text: str, start: int, final: bool) -> Found:
    found = mark.match(text, start)
    if found is None:
        raise Unreadable
    if found.partial:
        raise _more(final)
    return found


def _balanced(text: str, start: int, final: bool, parts: re.Pattern = _JSON_PARTS) -> int:
    """Where the bracket that opens at ``start`` is closed again."""
    depth = 0
    for part in parts.finditer(text, start):
        sign = part.group()
        if sign in ('"', "'"):
            break  # a text that is not closed
        depth += (sign in _OPENING) - (sign in _CLOSING)
        if depth == 0:
            return part.end()
    raise _more(final)


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def from_json(text: str) -> Any:
    """Raises Unreadable for what is no JSON."""
    try:
        return json.loads(text, strict=False, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise Unreadable from None


def _arguments(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        value = from_json(value)
    if not isinstance(value, dict):
        raise Unreadable
    return value


def _at(value: Any, path: Sequence[str]) -> Any:
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


@dataclass(frozen=True)
class JsonBody:
    """Objects that hold the name, the arguments and perhaps an id, each under its path; ``listed``:
    in one list."""

    name: tuple[str, ...]
    arguments: tuple[str, ...]
    id: tuple[str, ...] | None = None
    listed: bool = False

    def read(self, text: str, start: int, final: bool, types: Types) -> tuple[list[Call], int]:
        start = skip_space(text, start)
        if start == len(text):
            raise _more(final)
        if text[start] not in "{[":
            raise Unreadable
        end = _balanced(text, start, final)
        value = from_json(text[start:end])
        found = [self._call(each) for each in (value if isinstance(value, list) else [value])]
        if not found:
            raise Unreadable
        return found, end

    def _call(self, value: Any) -> Call:
        name = _at(value, self.name)
        arguments = _at(value, self.arguments)
        if arguments is None and isinstance(value, dict):  # the other of the two common names
            arguments = next((value[k] for k in ("arguments", "parameters") if k in value), None)
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise Unreadable
        given = _at(value, self.id) if self.id else None
        return Call(
            name,
            {} if arguments is None else _arguments(arguments),
            given if isinstance(given, str) and given else None,
        )


@dataclass(frozen=True)
class NamedJsonBody:
    """The name, then ``middle``, then the arguments as JSON."""

    middle: Mark

    def read(self, text: str, start: int, final: bool, types: Types) -> tuple[list[Call], int]:
        name, end = _name(text, start, final)
        found = _after(self.middle, text, end, final)
        begin = skip_space(text, found.end)
        if begin == len(text):
            raise _more(final)
        if text[begin] != "{":
            raise Unreadable
        end = _balanced(text, begin, final)
        return [Call(name, _arguments(from_json(text[begin:end])), found.id)], end


@dataclass(frozen=True)
class PairsBody:
    """The name, then pairs. ``opening`` stands before the first key, ``between`` before a further
    one; ``as_text`` between a key and a text, ``as_json`` between a key and another value (the same
    where the template does not tell them apart); ``closing`` behind a value, with ``space`` of its
    own; ``ends`` behind the last, ``empty`` behind the name where there are none."""

    opening: Mark
    between: Mark
    as_text: Mark
    as_json: Mark
    closing: Mark
    space: str
    ends: Mark
    empty: Mark

    def read(self, text: str, start: int, final: bool, types: Types) -> tuple[list[Call], int]:
        name, end = _name(text, start, final)
        known = types.get(name, {})
        arguments: dict[str, Any] = {}
        before = self.opening
        while True:
            found = before.match(text, end)
            if found is not None and not found.partial:
                key, value, end = self._pair(text, found.end, final, known)
                arguments[key] = value
                before = self.between
                continue
            ended = (self.ends if arguments else self.empty).match(text, end)
            if found is None and ended is None:
                raise Unreadable
            if not final and (found is not None or (ended is not None and ended.partial)):
                raise Incomplete
            # A stop token may have taken the place of the last mark, not of all.
            least = 1 if arguments else len(self.empty) - len(self.ends) + 1
            if ended is None or (ended.partial and ended.parts < max(1, least)):
                raise Unreadable
            return [Call(name, arguments)], ended.end

    def _pair(
        self, text: str, start: int, final: bool, known: Mapping[str, str]
    ) -> tuple[str, Any, int]:
        end = start
        while True:
            found = self.as_text.match(text, end)
            other = self.as_json.match(text, end)
            if found and not found.partial:
                kind = "text" if self.as_text.text != self.as_json.text else ""
                break
            if other and not other.partial:
                found = other
                kind = "json"
                break
            if not final and (found is not None or other is not None):
                raise Incomplete
            if end >= len(text) or text[end] == "\n":
                raise _more(final) if end >= len(text) else Unreadable()
            end += 1
        key = text[start:end].strip()
        if not key:
            raise Unreadable
        value, end = self._value(text, found.end, final)
        return key, _typed(value, kind or known.get(key, "")), end

    def _value(self, text: str, start: int, final: bool) -> tuple[str, int]:
        """The text up to the first closing mark that the rest of a call follows."""
        place = start
        while True:
            place = text.find(self.closing.first, place)
            if place < 0:
                raise _more(final)
            closed = self.closing.match(text, place)
            if closed is not None and closed.partial and not final:
                raise Incomplete
            if closed is not None and not closed.partial:
                follows = [m.match(text, closed.end) for m in (self.between, self.ends)]
                if any(each and not each.partial for each in follows):
                    return self._trimmed(text[start:place]), closed.end
                if any(follows):
                    if not final:
                        raise Incomplete
                    return self._trimmed(text[start:place]), closed.end
            place += 1

    def _trimmed(self, value: str) -> str:
        value = value.removesuffix(self.space)
        own = self.as_text.text[len(self.as_text.text.rstrip()) :]
        return value.removeprefix(own)


def _typed(value: str, kind: str) -> Any:
    """``value`` as its schema's type says; of an unknown type what it is as JSON or Python."""
    if kind == NULLABLE and value.strip() in ("null", "None"):
        return None
    if kind in ("string", "text", NULLABLE):
        return value
    for read in (from_json, _literal):
        try:
            return read(value.strip())
        except Unreadable:
            continue
    return value


def _literal(text: str) -> Any:
    try:
        value = ast.literal_eval(text)
        json.dumps(value, allow_nan=False)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise Unreadable from None
    return value


@dataclass(frozen=True)
class PythonBody:
    """``name(key=value)``; ``listed``: several in one list. Names and keys need not be Python's."""

    listed: bool = False

    def read(self, text: str, start: int, final: bool, types: Types) -> tuple[list[Call], int]:
        start = skip_space(text, start)
        if start == len(text):
            raise _more(final)
        if not self.listed or text[start] != "[":
            call, end = self._call(text, start, final)
            return [call], end
        found = []
        end = start + 1
        while True:
            call, end = self._call(text, end, final)
            found.append(call)
            end = skip_space(text, end)
            if end == len(text):
                raise _more(final)
            if text[end] not in ",]":
                raise Unreadable
            end += 1
            if text[end - 1] == "]":
                return found, end

    def _call(self, text: str, start: int, final: bool) -> tuple[Call, int]:
        name, begin = _name(text, start, final)
        if begin == len(text):
            raise _more(final)
        if text[begin] != "(":
            raise Unreadable
        end = _balanced(text, begin, final, _PYTHON_PARTS)
        arguments = {}
        for argument in _separated(text[begin + 1 : end - 1]):
            key, equals, value = argument.partition("=")
            if not equals or not _KEY.fullmatch(key.strip()):
                raise Unreadable
            arguments[key.strip()] = _python_value(value)
        return Call(name, arguments), end


def _separated(text: str) -> Iterator[str]:
    """The arguments of a call, which stand between commas."""
    start = 0
    depth = 0
    for part in _PYTHON_COMMAS.finditer(text):
        sign = part.group()
        depth += (sign in _OPENING) - (sign in _CLOSING)
        if sign == "," and depth == 0:
            yield text[start : part.start()]
            start = part.end()
    if text[start:].strip():
        yield text[start:]


def _python_value(text: str) -> Any:
    try:
        tree = ast.parse(text.strip(), mode="eval")
        return _literal(ast.unparse(_Constants().visit(tree)))
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise Unreadable from None


class _Constants(ast.NodeTransformer):
    """JSON's names of constants as Python's."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_CONSTANTS[node.id]) if node.id in _CONSTANTS else node


@dataclass(frozen=True)
class BareKeysBody:
    """``name{key:value}``, texts between ``quote`` marks, which have no escapes."""

    quote: str
    _parts: re.Pattern = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        quote = re.escape(self.quote)
        parts = rf"{quote}(?P<text>.*?){quote}|(?P<key>[\w.$-]+)(?=\s*:)|(?P<open>{quote})|."
        object.__setattr__(self, "_parts", re.compile(parts, re.DOTALL))

    def read(self, text: str, start: int, final: bool, types: Types) -> tuple[list[Call], int]:
        name, begin = _name(text, start, final)
        begin = skip_space(text, begin)
        if begin == len(text):
            raise _more(final)
        if text[begin] != "{":
            raise Unreadable
        written = []
        depth = 0
        for part in self._parts.finditer(text, begin):
            sign = part.group()
            if part["open"] is not None or (part.end() == len(text) and self._cut(sign)):
                raise _more(final)
            if part["text"] is not None:
                sign = json.dumps(part["text"])
            elif part["key"] is not None:
                sign = json.dumps(sign)
            depth += (sign in ("{", "[")) - (sign in ("}", "]"))
            written.append(sign)
            if depth == 0:
                return [Call(name, _arguments(from_json("".join(written))))], part.end()
        raise _more(final)

    def _cut(self, sign: str) -> bool:
        """Whether the text ends within a quotation mark."""
        return bool(sign) and self.quote.startswith(sign)


def argument_types(tools: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """The types of parameters that the schemas of ``tools`` say."""
    return {name: dict(_types_of(schema)) for name, schema in _functions(tools)}


def _functions(tools: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for tool in tools:
        function = tool.get("function")
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            yield function["name"], function


def _types_of(function: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    if not isinstance(properties, Mapping):
        return
    for name, schema in properties.items():
        kinds = set(_kinds(schema))
        if len(kinds) == 1:
            yield name, kinds.pop()
        elif kinds == {"string", "null"}:
            yield name, NULLABLE


def _kinds(schema: Any) -> Iterator[str]:
    """The types that a schema allows."""
    yield from _own_kinds(schema)
    if isinstance(schema, Mapping):
        for union in (schema.get("anyOf"), schema.get("oneOf")):
            for each in union if isinstance(union, list) else ():
                yield from _own_kinds(each)


def _own_kinds(schema: Any) -> Iterator[str]:
    if not isinstance(schema, Mapping):
        return
    kind = schema.get("type")
    if isinstance(kind, str):
        yield kind
    elif isinstance(kind, list):
        yield from (each for each in kind if isinstance(each, str))
    elif isinstance(schema.get("enum"), list):
        yield from ("string" if isinstance(each, str) else "other" for each in schema["enum"])
