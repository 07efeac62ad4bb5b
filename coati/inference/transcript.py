"""Dialogues from files, and dialogues to a file, in the row shape that data preparation reads."""

import json
import os
import sys
from pathlib import Path

Messages = list[dict[str, str]]
PIPE = "-"


class Transcript:
    """Appends each dialogue to ``file`` as ``{"messages": [{role, content}, ...]}``; ``file`` None:
    nothing is kept."""

    def __init__(self, file: str | os.PathLike | None):
        self.file, self._messages = file, []

    def add(self, history: Messages) -> None:
        """The dialogue as it stands now. Rounds that it had to leave out since stay in the
        transcript."""
        if (
            not history
            or history[-1]["role"] != "assistant"
            or (self._messages and history[-1] is self._messages[-1])
        ):
            return  # no answer came
        self._messages = self._messages + history[-2:] if self._messages else list(history)

    def close(self) -> None:
        """The dialogue has ended."""
        if self.file is not None and self._messages:
            with open(self.file, "a", encoding="utf-8") as output:
                output.write(json.dumps({"messages": self._messages}, ensure_ascii=False) + "\n")
        self._messages = []


def dialogues(file: str) -> list[tuple[Messages, str]]:
    """What ``file`` asks: the messages before each question, and the question. ``-``: lines of
    standard input; a text
    file: its lines; another kind: its rows, of any shape that a prompt may have.

    Raises ValueError naming the file, or the row that holds no question.
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
    asked = [([], line.strip()) for line in lines if line.strip()]
    if not asked:
        raise ValueError(f"--prompt_file {file}: holds no question; expected one to a line")
    return asked


def _of_rows(file: str) -> list[tuple[Messages, str]]:
    from coati.inference.evaluate.generate_responses import read_prompts

    prompts, left_out = read_prompts([file])
    if left_out:
        place, reason = left_out[0]
        raise ValueError(
            f"--prompt_file {place}: no question here ({reason}); {len(left_out)} such rows"
        )
    return [(prompt.messages[:-1], prompt.question) for prompt in prompts]
