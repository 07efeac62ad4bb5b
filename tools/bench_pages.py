"""The table of benchmarks/: every program with its command and what it measures, as its own
docstring says them, and the modules that these share."""

import ast
import re
from pathlib import Path

from tools.flag_pages import ROOT


def bench_tables(folder: Path = ROOT / "benchmarks") -> str:
    """Programs that a user starts, then what these import or start themselves.

    Raises ValueError for a ``bench_*.py`` that does not say how it is started.
    """
    programs = ["| command | what it measures |", "| --- | --- |"]
    shared = ["| module | what it is |", "| --- | --- |"]
    for path in sorted(folder.glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        about = _first_sentence(text)
        command = _command(text, path.name)
        if command is None and path.name.startswith("bench_"):
            raise ValueError(f"{path}: its docstring has no line with `python benchmarks/...`")
        if command is None or "worker" in about:
            shared.append(f"| `{path.name}` | {about} |")
        else:
            programs.append(f"| `{command}` | {about} |")
    between = ["", "What they share, and the processes that they start:", ""]
    return "\n".join([*programs, *between, *shared])


def _first_sentence(text: str) -> str:
    sentence = re.split(r"\.(?:\s|$)", " ".join(text.split("\n\n")[0].split()), maxsplit=1)[0]
    return re.sub(r":\w+:(`[^`]+`)", r"\1", sentence).replace("``", "`")


def _command(text: str, name: str) -> str | None:
    """The first line that starts the program, with those that go on with its flags."""
    line = rf"^ *(python benchmarks/{re.escape(name)}.*(?:\n *(?!python|git)\S.*)*)"
    found = re.search(line, text, re.MULTILINE)
    return None if found is None else " ".join(found[1].split())
