"""Conversations from and to files, in the format that data preparation reads."""

import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from coati.utils.output_paths import with_folder

Messages = list[dict[str, Any]]
PIPE = "-"


class Asked(NamedTuple):
    """A question, the messages before it, and the functions that may be called (None: a row says
    nothing of them)."""

    before: Messages
    question: str
    tools: list[dict[str, Any]] | None = None


class Transcript:
    """Appends each conversation to ``file`` as ``{"messages": [{role, content}, ...]}``; does
    nothing where ``file`` is None."""

    def __init__(self, file: str | os.PathLike | None):
        self.file = file
        self._messages = []

    def add(self, history: Messages) -> None:
        """The conversation so far; rounds that were dropped from the context stay in the
        transcript."""
        if (
            not history
            or history[-1]["role"] != "assistant"
            or (self._messages and history[-1] is self._messages[-1])
        ):
            return  # no response came
        if not self._messages:
            self._messages = list(history)
            return
        known = (k for k, message in enumerate(history) if message is self._messages[-1])
        self._messages = self._messages + history[next(known, len(history) - 3) + 1 :]

    def close(self) -> None:
        """Write the conversation, which has ended."""
        if self.file is not None and self._messages:
            with open(with_folder(self.file), "a", encoding="utf-8") as output:
                output.write(json.dumps({"messages": self._messages}, ensure_ascii=False) + "\n")
        self._messages = []


def read_tools(file: str) -> list[dict[str, Any]]:
    """The schemas of a JSON file: a list of ``{"type": "function", "function": {...}}``, or of what
    is under function. Raises ValueError for anything else."""
    try:
        tools = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--tools {file}: {error}; expected a JSON list of schemas") from error
    found = [
        {"type": "function", "function": tool.get("function", tool)}
        for tool in (tools if isinstance(tools, list) else [])
        if isinstance(tool, dict)
    ]
    named = (isinstance(tool["function"], dict) and "name" in tool["function"] for tool in found)
    if not found or len(found) != len(tools) or not all(named):
        raise ValueError(
            f'--tools {file}: expected a JSON list of schemas such as {{"type": "function", '
            '"function": {"name": "f", "parameters": {...}}}'
        )
    return found


def conversations(file: str) -> list[Asked]:
    """The questions of ``file``, each with the messages before it. ``-``: lines of standard input;
    a text file: its lines; another kind: its rows, in any format of a prompt.

    Raises ValueError naming the file, or the row without a question.
    """
    if file != PIPE and Path(file).suffix not in (".txt", ""):
        return _of_rows(file)
    try:
        lines = (
            sys.stdin.readlines()
            if file == PIPE
            else Path(file).read_text(encoding="utf-8").splitlines()
        )
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--prompt_file {file}: {error}; expected a text file, or rows as .jsonl"
        ) from error
    asked = [Asked([], line.strip()) for line in lines if line.strip()]
    if not asked:
        raise ValueError(f"--prompt_file {file}: holds no question; expected one to a line")
    return asked


def _of_rows(file: str) -> list[Asked]:
    from coati.inference.evaluate.generate_responses import read_prompts

    prompts, skipped = read_prompts([file])
    if skipped:
        place, reason = skipped[0]
        raise ValueError(
            f"--prompt_file {place}: no question here ({reason}); {len(skipped)} such rows"
        )
    return [Asked(prompt.messages[:-1], prompt.question, prompt.tools) for prompt in prompts]
