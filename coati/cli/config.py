"""Flags from a YAML file, or from the ``arguments.json`` of an earlier run."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coati.cli.parser import Parser


def file_words(parser: "Parser", path: str | os.PathLike) -> list[str]:
    """The flags of a YAML (or JSON) mapping as command-line words, each value checked against its
    flag.

    Raises ValueError with file and line for text that is not YAML, a key that is no flag (with the
    nearest one), a key given twice and a value that its flag refuses.
    """
    words: list[str] = []
    seen: dict[str, int] = {}
    for key, node, line in _entries(path):
        where = f"{path}:{line}"
        action = parser.action_of(f"--{key}")
        if action is None or isinstance(action, argparse._HelpAction):
            raise ValueError(
                f"{where}: unknown key {key!r}{parser.nearest(f'--{key}').replace('--', '')}"
            )
        if action.dest in seen:
            raise ValueError(
                f"{where}: {key!r} repeats line {seen[action.dest]}; keep one of the two"
            )
        seen[action.dest] = line
        values = _texts(node, where, key)
        # `null` leaves the default; a file written by an earlier run may name the --config that it
        # came from.
        if not values or action.dest == "config":
            continue
        if action.nargs != "+" and len(values) > 1:
            raise ValueError(f"{where}: {key!r} takes one value, found {len(values)}")
        try:
            parser.read_value(action, values)
        except argparse.ArgumentError as error:
            raise ValueError(f"{where}: {key}: {error.message}") from error
        words += [f"--{key}={values[0]}"] if len(values) == 1 else [f"--{key}", *values]
    return words


def _entries(path: str | os.PathLike) -> list[tuple[str, Any, int]]:
    import yaml

    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ValueError(
            f"--config {path}: {error.strerror}; expected a YAML file of flags"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--config {path}: byte {error.start} is not UTF-8; expected a YAML file of flags"
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ValueError(
            f"{path}{line}: not valid YAML ({getattr(error, 'problem', None) or error})"
        ) from error
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path}:1: expected lines of the form 'flag: value', found a {root.id}")
    return [(key.value, node, key.start_mark.line + 1) for key, node in root.value]


def _texts(node: Any, where: str, key: str) -> list[str]:
    """The words of one YAML value, as written (5e-6 stays text, so that the flag's own type reads
    it)."""
    import yaml

    if isinstance(node, yaml.SequenceNode):
        return [text for item in node.value for text in _texts(item, where, key)]
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError(f"{where}: {key!r} holds a mapping; expected a value or a list of values")
    return [] if node.tag == "tag:yaml.org,2002:null" else [node.value]
