"""A calculator for the policy."""

import ast
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from coati.environments.tool_environment import ToolEnvironment, ToolError, schema

LONGEST = 1000  # characters of an expression
DIGITS = 1000  # of a result
_OPERATORS: dict[type, Callable[[Fraction, Fraction], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


class Calculator(ToolEnvironment):
    """``calculator(expression)``: numbers with + - * / // % ** and parentheses, computed
    exactly."""

    tools = (
        schema(
            "calculator",
            "Computes an expression of numbers with + - * / // % ** and parentheses.",
            expression="the expression, as 12 * (3 + 4)",
        ),
    )

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        return compute(arguments["expression"])


def compute(expression: Any) -> str:
    """The value of ``expression``: a whole number, or a decimal one of 15 places. Raises
    ToolError."""
    text = str(expression).strip().replace("^", "**").replace("×", "*").replace(",", "")
    if len(text) > LONGEST:
        raise ToolError(f"the expression has {len(text)} characters, at most {LONGEST} are taken")
    try:
        value = _value(ast.parse(text, mode="eval").body)
    except ZeroDivisionError:
        raise ToolError("division by zero") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        raise ToolError(f"{text!r} is no expression of numbers") from None
    if value.denominator == 1:
        return str(value.numerator)
    try:
        return f"{float(value):.15g}"
    except OverflowError:
        raise ToolError("the result is too large") from None


def _value(node: ast.AST) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left = _value(node.left)
        right = _value(node.right)
        if isinstance(node.op, ast.Pow):
            return _small(_power(left, right))
        if type(node.op) in _OPERATORS:
            return _small(Fraction(_OPERATORS[type(node.op)](left, right)))
    raise ValueError("no expression of numbers")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        result = float(base) ** float(exponent)
        if isinstance(result, complex):
            raise ToolError("a root of a negative number")
        return Fraction(result)
    size = max(abs(base.numerator), base.denominator).bit_length()
    if size * abs(exponent) > 4 * DIGITS:
        raise ToolError("the result is too large")
    return base ** int(exponent)


def _small(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator).bit_length() > 4 * DIGITS:
        raise ToolError("the result is too large")
    return value
