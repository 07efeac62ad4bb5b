"""The environment in which chat templates run: Jinja's sandbox, without attributes of Python and
changes of values, and with limits on what an expression may make."""

import json
import re
from collections.abc import Iterable
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_format
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MOST = 2**26  # characters that one expression may make, or a variable hold
MOST_ITEMS = 2**22  # of a list
MOST_BITS = 2**16  # of a power
FEW = 8  # parts of a chain that is written out as it is
_TEXT = {str}
_WIDTH = re.compile(r"%[^a-zA-Z%]*(?:\*|\d{6,})|\{[^{}]*:[^{}]*\d{6,}")


class GenerationBlock(Extension):
    """``{% generation %}...{% endgeneration %}``, which marks responses in some templates, as plain
    text: response spans are found by probing the template instead."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up; texts beyond :data:`MOST` are errors, not gigabytes: those
    that operators, paddings, joins and replacements make before they are made, others where they
    are assigned, returned or written."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
        )
        self.filters["tojson"] = _tojson
        self.filters["joined_texts"] = _joined
        self.filters["added_up"] = _added
        self.filters["within_limits"] = _within_limits
        self.filters["join"] = _with_small_join(self.filters["join"])
        self.filters["replace"] = _with_small_replace(self.filters["replace"])
        for name in ("center", "indent", "format"):
            self.filters[name] = _with_small_numbers(self.filters[name])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Jinja's hook for operators of :attr:`intercepted_binops`."""
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if hasattr(many, "__len__") and isinstance(times, int):
                    _check(len(many) * times, MOST if isinstance(many, str) else MOST_ITEMS)
        elif operator == "**":
            if isinstance(left, int) and isinstance(right, int):
                _check(left.bit_length() * right, MOST_BITS)
        elif isinstance(left, str):
            _check_format(left)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, /, *args: Any, **keywords: Any) -> Any:
        """Jinja's hook for calls: methods of texts (``ljust``, ``zfill``) take widths."""
        if not isinstance(function, Macro):  # the template's own, which is checked within
            _check_numbers(args)
            _check_numbers(keywords.values())
        method = getattr(function, "__wrapped__", function)  # as the sandbox leaves str.format
        text = getattr(method, "__self__", None)
        if isinstance(text, str):
            _check_method(method.__name__, text, args)
        return _within_limits(super().call(context, function, *args, **keywords))

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Jinja's hook for output, of a template, a macro or a block."""
        taken = []
        size = 0
        for part in parts:
            size += len(part)
            if size > MOST:
                _check(size)
            taken.append(part)
        return "".join(taken)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Joins().visit(super()._parse(source, name, filename))


class _Joins(NodeTransformer):
    """Chains of ``a ~ b`` and ``a + b``, which the sandbox hooks into not at all or at every
    operator, as one filter of the list of their parts; short ones that are written out stay as they
    are, which is most of a template's work. What is assigned is looked at."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        return self._filtered("joined_texts", node.nodes, node.lineno)

    def visit_Add(self, node: nodes.Add) -> nodes.Filter:
        return self._filtered("added_up", _parts(node), node.lineno)

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        node.nodes = [self._written(each) for each in node.nodes]
        return node

    def visit_Assign(self, node: nodes.Assign) -> nodes.Assign:
        value = self.visit(node.node)
        node.node = nodes.Filter(value, "within_limits", [], [], None, None, lineno=node.lineno)
        return node

    def _written(self, node: nodes.Expr) -> nodes.Expr:
        if not isinstance(node, nodes.Add | nodes.Concat) or len(_parts(node)) > FEW:
            return self.visit(node)
        if isinstance(node, nodes.Concat):
            node.nodes = [self.visit(part) for part in node.nodes]
            return node
        node.left = self._written(node.left)
        node.right = self.visit(node.right)
        return node

    def _filtered(self, name: str, parts: list[nodes.Expr], line: int) -> nodes.Filter:
        items = nodes.List([self.visit(part) for part in parts], lineno=line)
        return nodes.Filter(items, name, [], [], None, None, lineno=line)


def _parts(node: nodes.Expr) -> list[nodes.Expr]:
    """What a chain adds up, from the left."""
    if isinstance(node, nodes.Concat):
        return node.nodes
    parts: list[nodes.Expr] = []
    while isinstance(node, nodes.Add):
        parts.insert(0, node.right)
        node = node.left
    return [node, *parts]


def _joined(parts: list[Any]) -> str:
    texts = [str(part) for part in parts]
    _check(sum(map(len, texts)))
    return "".join(texts)


def _added(parts: list[Any]) -> Any:
    """The sum of ``parts`` from the left; of texts alone, as most are, in one step."""
    if {*map(type, parts)} == _TEXT:
        _check(sum(map(len, parts)))
        return "".join(parts)
    total = parts[0]
    for part in parts[1:]:
        if hasattr(total, "__len__") and hasattr(part, "__len__"):
            _check(len(total) + len(part), MOST if isinstance(total, str) else MOST_ITEMS)
        total = total + part
    return total


def _within_limits(value: Any) -> Any:
    """``value``, or an error if it, or a part of a tuple, is too long."""
    if isinstance(value, str):
        _check(len(value))
    elif isinstance(value, list):
        _check(len(value), MOST_ITEMS)
    elif isinstance(value, tuple):
        for each in value:
            _within_limits(each)
    return value


def _check_method(name: str, text: str, args: tuple[Any, ...]) -> None:
    """Before a method of ``text``."""
    if name in ("format", "format_map"):
        _check_format(text)
    elif name == "join" and args and isinstance(args[0], list | tuple | str):
        _check_join(args[0], text)
    elif name == "replace" and len(args) > 1:
        _check_replace(text, *args[:2])


def _check_join(parts: Any, between: Any) -> None:
    size = len(parts)
    if not isinstance(parts, str):
        size = sum(len(part) for part in parts if isinstance(part, str))
    _check(size + len(str(between)) * len(parts))


def _check_replace(text: Any, old: Any, new: Any) -> None:
    text, old, new = str(text), str(old), str(new)
    _check(len(text) + text.count(old) * max(0, len(new) - len(old)))


def _with_small_join(function: Any) -> Any:
    @wraps(function)
    def checked(eval_ctx: Any, value: Any, d: str = "", attribute: Any = None) -> str:
        parts = list(value)
        if attribute is None:
            _check_join(parts, d)
        return function(eval_ctx, parts, d, attribute)

    return checked


def _with_small_replace(function: Any) -> Any:
    @wraps(function)
    def checked(eval_ctx: Any, s: str, old: str, new: str, count: int | None = None) -> str:
        _check_replace(s, old, new)
        return function(eval_ctx, s, old, new, count)

    return checked


def _check_format(text: str) -> None:
    if _WIDTH.search(text):
        raise jinja2.TemplateRuntimeError("a width of more than 99999 in a format")


def _with_small_numbers(function: Any) -> Any:
    @wraps(function)
    def checked(*args: Any, **keywords: Any) -> Any:
        _check_numbers(args)
        _check_numbers(keywords.values())
        if function is do_format:
            _check_format(str(args[0]))
        return function(*args, **keywords)

    return checked


def _check_numbers(values: Any) -> None:
    for value in values:
        if type(value) is int:
            _check(value)


def _check(size: int, most: int = MOST) -> None:
    if size > most:
        raise jinja2.TemplateRuntimeError(f"an expression that makes {size:,} characters or items")


def _tojson(
    value: Any, ensure_ascii: bool = False, indent=None, separators=None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes HTML characters, which is wrong in a prompt.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
