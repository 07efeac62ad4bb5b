"""Stop strings and filtered words, found in streamed text."""

import json
import re
from collections.abc import Sequence
from pathlib import Path


class StopStringFilter:
    """Passes text on until a stop string or a filtered word; what might begin one is held back.

    ``reason`` is then "stop" or "content_filter"; neither the string or word nor anything after it
    is passed on.
    """

    def __init__(self, stop_strings: Sequence[str] = (), words: Sequence[str] = ()) -> None:
        self.stops = [stop for stop in stop_strings if stop]
        self.words = word_pattern(words)
        # One more than a word has: the next letter decides whether the word ends there.
        self._longest = max(map(len, words), default=-1) + 1
        self.reason: str | None = None
        self._text = ""
        self._passed = 0

    def push(self, piece: str, final: bool = False) -> str:
        """The text that can be passed on after ``piece``; ``final``: nothing comes after it."""
        if self.reason is not None:
            return ""
        self._text += piece
        end, self.reason = self._end(final)
        if self.reason is None and not final:
            end = max(self._passed, end - self._held_back())
        passed = self._text[self._passed : end]
        self._passed = end
        return passed

    def _end(self, final: bool) -> tuple[int, str | None]:
        found = [
            (at, "stop") for stop in self.stops if (at := self._text.find(stop, self._passed)) >= 0
        ]
        match = self.words.search(self._text, self._passed) if self.words else None
        if match and (final or match.end() < len(self._text)):
            found.append((match.start(), "content_filter"))
        return min(found, default=(len(self._text), None))

    def _held_back(self) -> int:
        """How many of the last characters may belong to a stop string or a word."""
        count = min(self._longest, len(self._text) - self._passed)
        for stop in self.stops:
            beginnings = (
                n
                for n in range(min(len(stop) - 1, len(self._text)), 0, -1)
                if self._text.endswith(stop[:n])
            )
            count = max(count, next(beginnings, 0))
        return count


def word_pattern(words: Sequence[str]) -> re.Pattern | None:
    """Matches any of ``words`` as a whole word, in any case; None without words."""
    if not words:
        return None
    return re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, words)) + r")(?!\w)", re.IGNORECASE)


def read_words(path: str | Path) -> list[str]:
    """The words of a filter file: a JSON list, or one to a line. Raises ValueError where it is
    neither."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: not readable as text ({error}); expected words, as JSON or one to a line"
        ) from None
    words = text.splitlines()
    if text.lstrip().startswith(("[", "{")):
        try:
            words = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}: not valid JSON ({error}); expected a list of words, or one to a line"
            ) from None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(
            f'{path}: expected a JSON list of words such as ["one", "two"], or one word to a line'
        )
    return [word.strip() for word in words if word.strip()]
