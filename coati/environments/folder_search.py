"""A search over the text files of a folder, for the policy."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from coati.environments.tool_environment import ToolEnvironment, ToolError, schema

ENDINGS = (".txt", ".md", ".rst")
PASSAGE = 800  # characters
K1 = 1.2  # of BM25 (Robertson and Zaragoza, 2009)
B = 0.75
_WORD = re.compile(r"\w+")


class FolderSearch(ToolEnvironment):
    """``search(query)``: the passages of a folder's text files that fit best, by BM25.

    Args:
        folder: read whole, its folders too (.txt, .md, .rst).
        results: passages that are returned.

    Raises:
        ValueError: for a folder that is not there or holds no text.
    """

    tools = (
        schema(
            "search",
            "Finds passages of a collection of texts.",
            query="words that the passage should hold",
        ),
    )

    def __init__(self, folder: str = "", results: int = 3) -> None:
        if not folder:
            raise ValueError('name the folder to search: --environment_args \'{"folder": "PATH"}\'')
        if not isinstance(results, int) or results < 1:
            raise ValueError(f"results {results!r}: expected a whole number of at least 1")
        self.passages = _passages(str(Path(folder).resolve()))
        self.results = results

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        found = self.passages.best(str(arguments["query"]), self.results)
        if not found:
            raise ToolError("nothing was found")
        return "\n\n".join(f"[{place}] {text}" for place, text in found)


class Passages:
    """Args: texts: (where it is from, text) each."""

    def __init__(self, texts: list[tuple[str, str]]) -> None:
        self.texts = texts
        self.counts = [Counter(_words(text)) for _, text in texts]
        self.sizes = [count.total() for count in self.counts]
        self.mean = sum(self.sizes) / len(texts)
        having = Counter(word for count in self.counts for word in count)
        self.weights = {
            word: math.log(1 + (len(texts) - n + 0.5) / (n + 0.5)) for word, n in having.items()
        }

    def best(self, query: str, most: int) -> list[tuple[str, str]]:
        """The passages with words of ``query``, best first."""
        words = _words(query)
        scores = [(sum(self._score(word, k) for word in words), -k) for k in range(len(self.texts))]
        return [self.texts[-k] for score, k in sorted(scores, reverse=True)[:most] if score > 0]

    def _score(self, word: str, k: int) -> float:
        count = self.counts[k][word]
        if not count:
            return 0.0
        size = K1 * (1 - B + B * self.sizes[k] / self.mean)
        return self.weights[word] * count * (K1 + 1) / (count + size)


@lru_cache(maxsize=2)
def _passages(folder: str) -> Passages:
    base = Path(folder)
    if not base.is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    texts = [
        (str(path.relative_to(base)), text)
        for path in sorted(base.rglob("*"))
        if path.suffix.lower() in ENDINGS and path.is_file()
        for text in _pieces(path.read_text(encoding="utf-8", errors="replace"))
    ]
    if not texts:
        raise ValueError(f"{folder} holds no text ({', '.join(ENDINGS)})")
    return Passages(texts)


def _pieces(text: str) -> Iterator[str]:
    """Paragraphs, short ones joined up to :data:`PASSAGE` characters, long ones cut."""
    held = ""
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = " ".join(paragraph.split())
        if held and len(held) + len(paragraph) > PASSAGE:
            yield held
            held = ""
        held = f"{held} {paragraph}".strip()
        while len(held) > PASSAGE:
            yield held[:PASSAGE]
            held = held[PASSAGE:]
    if held:
        yield held


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
