"""What was drawn or scored, on disk as it comes: a process that is killed loses what it was at work
on, and the next one goes on behind it."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from coati.inference.evaluate.generate_responses import Prompt
from coati.inference.samples.samplers import Draw, Drawn, Sampler
from coati.utils.logging import get_logger
from coati.utils.phases import phase

logger = get_logger(__name__)

RESPONSES = "responses.jsonl"
Key = tuple[int, int]  # of a response: its prompt's number, and its own


class OtherSettings(ValueError):
    """The file was written under other settings; the message says which."""


class Journal:
    """A file of JSON lines: the settings that decide the others, then those. What a line was begun
    for when the process was killed is not there.

    Raises OtherSettings for a file of other ``settings``, ValueError for one that is damaged.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self._lock = Lock()
        settings = json.loads(json.dumps(settings))  # as they are read
        size = self._read(settings) if path.is_file() else 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "r+b" if path.is_file() else "wb")  # noqa: SIM115
        self._file.truncate(size)
        self._file.seek(size)
        if not size:
            self._write([{"settings": settings}])

    def _read(self, settings: dict[str, Any]) -> int:
        """Fill ``rows``; how many bytes are whole lines."""
        content = self.path.read_bytes()
        size = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:size].splitlines(), start=1):
            try:
                row = json.loads(line)
                if not isinstance(row, dict) or (number == 1) != ("settings" in row):
                    raise ValueError("not a line of this file")
            except ValueError as error:
                raise ValueError(
                    f"{self.path}:{number}: damaged ({error}); remove the file, or restore it"
                ) from error
            if number > 1:
                self.rows.append(row)
            elif row["settings"] != settings:
                raise OtherSettings(f"{self.path} {_difference(row['settings'], settings)}")
        return size

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Keep ``rows``; several threads may."""
        with self._lock:
            self._write(rows)

    def _write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        self._file.write("".join(lines).encode("utf-8", "surrogatepass"))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Nothing is added afterward."""
        self._file.close()


def _difference(before: Any, now: Mapping[str, Any]) -> str:
    held = before if isinstance(before, dict) else {}
    names = [name for name in {**held, **now} if held.get(name) != now.get(name)]
    shown = (f"{name} {_short(held.get(name))}, now {_short(now.get(name))}" for name in names)
    return f"was written under other settings: {'; '.join(shown)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:60]}... (hash {_digest(text)})"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def prompt_key(prompt: Prompt) -> str:
    """What a prompt is known by in other runs: a hash of its messages, answer and tools."""
    return _digest(json.dumps([prompt.messages, prompt.gt_answer, prompt.tools]))


def digest_of(prompts: Sequence[Prompt]) -> str:
    """A hash of all of them with their numbers."""
    return _digest(json.dumps([[prompt.number, prompt_key(prompt)] for prompt in prompts]))


@phase("drawing responses")
def draw_all(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    count: int,
    folder: Path,
    settings: Mapping[str, Any],
) -> dict[int, list[Drawn]]:
    """``count`` responses to each prompt, which ``sampler`` is ready for, by the prompt's number:
    those in ``folder`` and, drawn now, the others. More than ``count`` that are there are left.

    Raises ValueError for a folder of other ``settings``, with what to do.
    """
    try:
        journal = Journal(folder / RESPONSES, settings)
    except OtherSettings as error:
        raise ValueError(
            f"--output_dir {folder}: {error}; name another directory, or remove this one"
        ) from error
    found: dict[Key, Drawn] = {}
    try:
        for row in journal.rows:
            each = _drawn_of(row, journal.path)
            found[each.number, each.sample] = each
        wanted = [
            Draw(prompt, sample)
            for prompt in prompts
            for sample in range(count)
            if (prompt.number, sample) not in found
        ]
        there = len(prompts) * count - len(wanted)
        if there:
            logger.info(f"{there} of {there + len(wanted)} responses are in {journal.path}")

        def keep(drawn: Sequence[Drawn]) -> None:
            journal.add(map(vars, drawn))
            found.update({(each.number, each.sample): each for each in drawn})

        sampler.draw(wanted, keep)
    finally:
        journal.close()
    return {
        prompt.number: [found[prompt.number, sample] for sample in range(count)]
        for prompt in prompts
    }


def _drawn_of(row: dict[str, Any], path: Path) -> Drawn:
    try:
        return Drawn(**row)
    except TypeError as error:
        raise ValueError(f"{path}: a line is no response ({error}); remove the file") from error
