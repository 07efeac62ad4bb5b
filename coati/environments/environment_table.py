"""The table of built-in environments, and checks of their names. Light: parsers import it."""

import ast
import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Listed:
    """One row of the table. ``place``: module:class. ``arguments``: those of
    ``--environment_args`` that it takes."""

    about: str
    place: str
    arguments: tuple[str, ...] = ()


ENVIRONMENTS: dict[str, Listed] = {
    "calculator": Listed(
        "a tool that computes an expression", "coati.environments.calculator:Calculator"
    ),
    "python": Listed(
        "a tool that runs a Python program, isolated",
        "coati.environments.python_tool:PythonTool",
        ("seconds", "memory_mib"),
    ),
    "search": Listed(
        "a tool that finds passages in the text files of a folder",
        "coati.environments.folder_search:FolderSearch",
        ("folder", "results"),
    ),
}


def is_class_file(name: str) -> bool:
    """Whether ``name`` is a class in a file, ``path.py:Class``."""
    return name.rpartition(":")[0].endswith(".py") or name.endswith(".py")


def file_and_class(name: str) -> tuple[Path, str]:
    """Split ``path.py:Class``. Raises ValueError if the class is missing."""
    path, _, found = name.rpartition(":")
    if not path or not found.isidentifier():
        raise ValueError(
            f"--environment {name}: name the class too, as in {name.rstrip(':')}:MyEnvironment"
        )
    return Path(path), found


def check_environment(name: str) -> None:
    """Raise ValueError for an unknown name, and a file that is not there, is no Python, or has no
    such class; it is parsed, not executed."""
    if is_class_file(name):
        return _check_file(name)
    if name in ENVIRONMENTS:
        return None
    nearest = difflib.get_close_matches(name, ENVIRONMENTS, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else "."
    raise ValueError(
        f"--environment {name}: unknown{hint} There are {', '.join(ENVIRONMENTS)}, and "
        "path.py:Class of your own"
    )


def _check_file(name: str) -> None:
    path, wanted = file_and_class(name)
    if not path.is_file():
        raise ValueError(f"--environment {name}: there is no file {path}")
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except SyntaxError as error:
        raise ValueError(f"--environment {name}: {path}:{error.lineno}: {error.msg}") from error
    except ValueError as error:  # null bytes
        raise ValueError(f"--environment {name}: {path} is no Python file ({error})") from error
    names = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
    imported = [
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    ]
    classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    if wanted not in [*classes, *names, *imported] and "*" not in imported:
        found = f"it defines {', '.join(classes)}" if classes else "it defines no class"
        raise ValueError(f"--environment {name}: {path} has no {wanted}; {found}")


def environment_arguments(name: str, text: str | None) -> dict[str, Any]:
    """What ``--environment_args`` says. Raises ValueError for what is no JSON object, and for names
    that a built-in environment does not take."""
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--environment_args {text}: no JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(
            f'--environment_args {text}: expected a JSON object, as \'{{"folder": "docs"}}\''
        )
    if name in ENVIRONMENTS:
        known = ENVIRONMENTS[name].arguments
        for key in found:
            if key not in known:
                takes = ", ".join(known) or "none"
                raise ValueError(f"--environment_args: {name} takes no {key!r}; it takes {takes}")
    return found
