"""Decontamination: training rows that share an n-gram of words with an evaluation row or a
benchmark."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from coati.dataset.clean.text_normalization import (
    ngram_hashes,
    prompt_text,
    spoken_texts,
    word_hashes,
    words,
)
from coati.dataset.rows.input_files import decode, find_files, read_rows
from coati.dataset.rows.row_errors import RowError
from coati.dataset.rows.source_row import SourceRow


def row_grams(row: SourceRow, size: int) -> np.ndarray:
    """The n-grams of ``size`` words in each text of ``row``, and its whole prompt if that is
    shorter."""
    return np.concatenate(
        [ngram_hashes(hashes, length) for _, hashes, length in _pieces(row, size)] or [_NOTHING]
    )


_NOTHING = np.empty(0, dtype=np.uint64)


def _pieces(row: SourceRow, size: int) -> Iterator[tuple[list[str], np.ndarray, int]]:
    """``(words, their hashes, n)`` of each text to take n-grams of."""
    for text in spoken_texts(row):
        found = words(text)
        if len(found) >= size:
            yield found, word_hashes(found), size
    prompt = words(prompt_text(row))
    if 0 < len(prompt) < size:
        yield prompt, word_hashes(prompt), len(prompt)


@dataclass
class Overlap:
    """Hashes of the n-grams not to be shared: sorted, each with the number of its ``(reason,
    place)`` in ``sources``; 12 bytes each."""

    size: int
    grams: np.ndarray
    owners: np.ndarray
    sources: list[tuple[str, str]]

    @classmethod
    def of(cls, size: int, found: list[tuple[str, str, np.ndarray]]) -> "Overlap":
        """From ``(reason, place, n-gram hashes)`` of each text."""
        sizes = [len(one) for _, _, one in found]
        together = np.concatenate([one for _, _, one in found] or [_NOTHING])
        owners = np.repeat(np.arange(len(found), dtype=np.uint32), sizes)
        unique, first = np.unique(together, return_index=True)
        return cls(size, unique, owners[first], [(reason, place) for reason, place, _ in found])

    def check(self, row: SourceRow) -> None:
        """Raise RowError with the shared words and where they are from."""
        for found, hashes, length in _pieces(row, self.size) if len(self.grams) else ():
            mine = ngram_hashes(hashes, length)
            places = np.minimum(np.searchsorted(self.grams, mine), len(self.grams) - 1)
            hits = np.flatnonzero(self.grams[places] == mine)
            if len(hits):
                start = int(hits[0])
                reason, place = self.sources[self.owners[places[start]]]
                shared = " ".join(found[start : start + length])
                raise RowError(reason, f"{place} holds {shared!r} too")


def benchmark_grams(files: tuple[str, ...], size: int) -> list[tuple[str, str, np.ndarray]]:
    """``(reason, place, n-gram hashes)`` of every row of benchmark files, whatever its keys.
    ValueError: no text found."""
    found = []
    for file in find_files(files) if files else ():
        for line, row in read_rows(file):
            try:
                texts = _texts(decode(row))
            except RowError as error:
                raise ValueError(
                    f"{file}:{line}: {error}; fix the benchmark file, which cannot be compared with"
                ) from error
            hashed = [word_hashes(words(text)) for text in texts]
            # A text of fewer words counts whole, like a prompt.
            mine = [ngram_hashes(one, min(size, len(one))) for one in hashed if len(one)]
            if mine:
                found.append(
                    ("benchmark_overlap", f"{file}:{line}", np.unique(np.concatenate(mine)))
                )
    if files and not found:
        raise ValueError(
            f"{', '.join(files)}: no text found to compare with; expected rows with texts under "
            "any keys"
        )
    return found


def _texts(value: Any) -> list[str]:
    """Every string at any depth, keys aside."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for one in inner for text in _texts(one)]
