"""Kinds of flags and their value types: each says what it expected and found, and argparse adds the
flag's name."""

import argparse
from collections.abc import Callable
from typing import Any

TRUE = ("true", "yes", "on", "1")
FALSE = ("false", "no", "off", "0")


def whole_number(least: int) -> Callable[[str], int]:
    """A type that reads whole numbers of at least ``least``; its ``schema`` says so in JSON."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least {least}, found {text!r}"
            )
        return value

    read.schema = {"type": "integer", "minimum": least}  # type: ignore[attr-defined]
    return read


def number(
    least: float, *, exclusive: bool = False, most: float = float("inf")
) -> Callable[[str], float]:
    """A type that reads finite numbers in [least, most], or above ``least`` when ``exclusive``; its
    ``schema`` says so in JSON."""
    bound = f"above {least:g}" if exclusive else f"of at least {least:g}"
    if most != float("inf"):
        bound += f" and at most {most:g}"

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        # Written so that nan fails it too.
        fits = (
            least <= value <= most and value != float("inf") and not (exclusive and value == least)
        )
        if not fits:
            raise argparse.ArgumentTypeError(f"expected a number {bound}, found {text!r}")
        return value

    bounds = {"exclusiveMinimum" if exclusive else "minimum": least, "maximum": most}
    if most == float("inf"):
        del bounds["maximum"]
    read.schema = {"type": "number", **bounds}  # type: ignore[attr-defined]
    return read


def boolean(text: str) -> bool:
    """The optional value of a switch: ``--use_wandb`` and ``--use_wandb true`` mean the same."""
    if text.lower() in TRUE:
        return True
    if text.lower() in FALSE:
        return False
    raise argparse.ArgumentTypeError(f"is a switch: give no value, true or false; found {text!r}")


def add_text(
    group: argparse._ActionsContainer,
    *names: str,
    help: str,
    default: str | None = None,
    unit: str = "DIR",
) -> None:
    """A flag with a name, path or other text; ``unit`` is what the help calls it."""
    group.add_argument(*names, default=default, metavar=unit, help=help)


def add_count(
    group: argparse._ActionsContainer,
    *names: str,
    help: str,
    default: int | None = None,
    unit: str = "N",
    least: int = 1,
) -> None:
    """A flag with a whole number of at least ``least``."""
    group.add_argument(*names, type=whole_number(least), default=default, metavar=unit, help=help)


def add_number(
    group: argparse._ActionsContainer,
    *names: str,
    help: str,
    default: float | None = None,
    unit: str,
    **bounds: Any,
) -> None:
    """A flag with a number of at least 0; ``bounds`` are keywords of :func:`number`."""
    group.add_argument(*names, type=number(0, **bounds), default=default, metavar=unit, help=help)


def add_switch(group: argparse._ActionsContainer, *names: str, help: str) -> None:
    """A flag that is off unless given; ``--name false`` takes back what a ``--config`` file
    switched on."""
    group.add_argument(
        *names, nargs="?", type=boolean, const=True, default=False, metavar="true|false", help=help
    )


def table(what: str, rows: dict[str, str], sign: str = ":") -> str:
    """A flag's help that says what each of its choices means."""
    return f"{what}. " + "; ".join(f"{name}{sign} {about}" for name, about in rows.items()).replace(
        "%", "%%"
    )
