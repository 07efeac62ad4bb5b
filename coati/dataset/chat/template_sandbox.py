"""The environment in which chat templates run: Jinja's sandbox, without attributes of Python and
changes of values, and with limits on what an expression may make."""

import json
import re
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_format
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MOST = 2**26  # characters, or items of a list, that one expression may make
MOST_BITS = 2**16  # of a power
_WIDTH = re.compile(r"%[^a-zA-Z%]*(?:\*|\d{6,})|\{[^{}]*:[^{}]*\d{6,}")


class GenerationBlock(Extension):
    """``{% generation %}...{% endgeneration %}``, which marks responses in some templates, as plain
    text: response spans are found by probing the template instead."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up; products, sums and paddings beyond :data:`MOST` are
    errors, not gigabytes."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
        )
        self.filters["tojson"] = _tojson
        self.filters["joined_texts"] = _joined
        self.filters["added_up"] = _added
        for name in ("center", "indent", "format"):
            self.filters[name] = _with_small_numbers(self.filters[name])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Jinja's hook for operators of :attr:`intercepted_binops`."""
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if hasattr(many, "__len__") and isinstance(times, int):
                    _check(len(many) * times)
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
        method = getattr(function, "__wrapped__", None)  # as the sandbox leaves str.format
        if isinstance(getattr(method, "__self__", None), str):
            _check_format(method.__self__)
        return super().call(context, function, *args, **keywords)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Joins().visit(super()._parse(source, name, filename))


class _Joins(NodeTransformer):
    """Chains of ``a ~ b`` and ``a + b``, which the sandbox hooks into not at all or at every
    operator, as one filter of the list of their parts."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        return self._filtered("joined_texts", node.nodes, node.lineno)

    def visit_Add(self, node: nodes.Add) -> nodes.Filter:
        parts: list[nodes.Node] = []
        chain: nodes.Node = node
        while isinstance(chain, nodes.Add):
            parts.insert(0, chain.right)
            chain = chain.left
        return self._filtered("added_up", [chain, *parts], node.lineno)

    def _filtered(self, name: str, parts: list[nodes.Node], line: int) -> nodes.Filter:
        items = nodes.List([self.visit(part) for part in parts], lineno=line)
        return nodes.Filter(items, name, [], [], None, None, lineno=line)


def _joined(parts: list[Any]) -> str:
    texts = [str(part) for part in parts]
    _check(sum(map(len, texts)))
    return "".join(texts)


def _added(parts: list[Any]) -> Any:
    """The sum of ``parts`` from the left; of texts alone, as most are, in one step."""
    if all(type(part) is str for part in parts):
        _check(sum(map(len, parts)))
        return "".join(parts)
    total = parts[0]
    for part in parts[1:]:
        if hasattr(total, "__len__") and hasattr(part, "__len__"):
            _check(len(total) + len(part))
        total = total + part
    return total


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
