"""A parser's flags as a commented YAML file, and as a JSON schema for editors."""

import argparse
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coati.cli.parser import Parser
from coati.cli.values import boolean

WIDTH = 100
REQUIRED = "(required)"
# Flags that a file does not hold: help, and the file itself.
OUTSIDE = ("help", "config")


def flags_of(parser: Parser) -> list[argparse.Action]:
    """The flags that a YAML file may hold, in the order of the help."""
    return [
        action
        for action in parser.documented()
        if action.option_strings and action.dest not in OUTSIDE
    ]


def key_of(action: argparse.Action) -> str:
    """The key of a flag in YAML."""
    return action.option_strings[0].removeprefix("--")


def config_text(parser: Parser, verb: str, given: Mapping[str, Any], schema: Path | None) -> str:
    """The YAML of ``coati init VERB``: every flag with its default, and its help as a comment.

    ``given``: values by ``dest`` that replace defaults. ``schema``: what an editor with a YAML
    language server checks the file against.
    """
    lines = [] if schema is None else [f"# yaml-language-server: $schema={schema}"]
    lines += _comment(parser.description or "")
    lines += [f"# Run it: coati {verb} FILE.yaml; flags after the file override it.", ""]
    written = set(flags_of(parser))
    for group in parser._action_groups:
        members = [action for action in group._group_actions if action in written]
        if not members:
            continue
        if group.title not in ("options", "optional arguments"):
            lines += [f"# ---- {group.title} ----", *_comment(group.description or ""), ""]
        for action in members:
            lines += [*_comment(_help(action)), *_entry(action, given), ""]
    return "\n".join(lines).rstrip() + "\n"


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(" ".join(text.split()), WIDTH - 2)]


def _help(action: argparse.Action) -> str:
    text = (action.help or "").replace("%%", "%")
    if action.choices is not None:
        text += f" [{', '.join(map(str, action.choices))}]"
    return text


def _entry(action: argparse.Action, given: Mapping[str, Any]) -> list[str]:
    value = given.get(action.dest, action.default)
    if value is None or value == []:
        return [f"{key_of(action)}:"]
    return [f"{key_of(action)}: {scalar(value)}"]


def scalar(value: Any) -> str:
    """``value`` in YAML's flow style, on one line. Numbers as a person writes them."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(scalar, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        text = repr(value)
        # YAML 1.1 reads 5e-06 as text, 5.0e-06 as a number.
        return text.replace("e", ".0e") if "e" in text and "." not in text else text
    if isinstance(value, int):
        return str(value)
    text = str(value)
    plain = text.replace("/", "").replace("_", "").replace("-", "").replace(".", "")
    known = text.lower() in ("null", "true", "false", "yes", "no", "on", "off")
    if plain.isalpha() and text.isascii() and not known:
        return text
    return json.dumps(text, ensure_ascii=False)


def schema_of(parser: Parser) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a YAML file of ``parser``'s flags."""
    properties = {}
    for action in flags_of(parser):
        for name in action.option_strings:
            properties[name.removeprefix("--")] = _property(action)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": parser.prog,
        "description": parser.description,
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def _property(action: argparse.Action) -> dict[str, Any]:
    one = _value(action)
    several = action.nargs == "+" or isinstance(action, argparse._AppendAction)
    if several:
        shapes = [one, {"type": "array", "items": one}]
    elif isinstance(action.nargs, int):
        count = action.nargs
        shapes = [{"type": "array", "items": one, "minItems": count, "maxItems": count}]
    else:
        shapes = [one]
    # An empty key leaves the default.
    shown: dict[str, Any] = {"anyOf": [*shapes, {"type": "null"}], "description": _help(action)}
    if action.default not in (None, argparse.SUPPRESS):
        shown["default"] = action.default
    return shown


def _value(action: argparse.Action) -> dict[str, Any]:
    read: Any = action.type
    if action.choices is not None and read in (None, int):
        return {"enum": list(action.choices)}
    if read is boolean:
        return {"type": "boolean"}
    if read is int:
        return {"type": "integer"}
    if read is float:
        return {"type": "number"}
    # A name may look like a number to YAML; what else reads a text has no schema of its own.
    return getattr(read, "schema", {"type": ["string", "number", "boolean"]})
