"""Where an answer's text ends before the model ends it: at a stop string, or before a word that is
not let through."""

import json
import re
from collections.abc import Sequence
from pathlib import Path


class StopStringFilter:
    """Lets text through until a stop string or a listed word comes; what might be the beginning of
    one waits.

    ``reason`` is then "stop" or "content_filter"; neither the string nor the word, nor anything
    behind, is given.
    """

    def __init__(self, stop_strings: Sequence[str] = (), words: Sequence[str] = ()) -> None:
        self.stops = [stop for stop in stop_strings if stop]
        self.words = word_pattern(words)
        # One more than a word has, since the letter behind it decides whether it is a word of its
        # own.
        self._longest = max(map(len, words), default=-1) + 1
        self.reason: str | None = None
        self._text, self._given = "", 0

    def push(self, piece: str, final: bool = False) -> str:
        """The text that can be given now that ``piece`` came; ``final``: nothing comes after it."""
        if self.reason is not None:
            return ""
        self._text += piece
        end, self.reason = self._end(final)
        if self.reason is None and not final:
            end = max(self._given, end - self._waiting())
        given, self._given = self._text[self._given : end], end
        return given

    def _end(self, final: bool) -> tuple[int, str | None]:
        found = [
            (at, "stop") for stop in self.stops if (at := self._text.find(stop, self._given)) >= 0
        ]
        match = self.words.search(self._text, self._given) if self.words else None
        if match and (final or match.end() < len(self._text)):
            found.append((match.start(), "content_filter"))
        return min(found, default=(len(self._text), None))

    def _waiting(self) -> int:
        """How many of the last characters may belong to a stop string or a word."""
        count = min(self._longest, len(self._text) - self._given)
        for stop in self.stops:
            beginnings = (
                n
                for n in range(min(len(stop) - 1, len(self._text)), 0, -1)
                if self._text.endswith(stop[:n])
            )
            count = max(count, next(beginnings, 0))
        return count


def word_pattern(words: Sequence[str]) -> re.Pattern | None:
    """Finds any of ``words`` as a word of its own, whatever its case; None without words."""
    if not words:
        return None
    return re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, words)) + r")(?!\w)", re.IGNORECASE)


def read_words(path: str | Path) -> list[str]:
    """The words of a filter file: a JSON list of texts, or one to a line. Raises ValueError where
    it is neither."""
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
