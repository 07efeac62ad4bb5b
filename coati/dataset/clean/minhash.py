"""Rows that are close to each other, found without comparing all with all: MinHash signatures in an
LSH index.

Signatures and index are those of datasketch (Broder 1997; Indyk and Motwani 1998).
"""

from functools import cache
from typing import Any

import numpy as np

from coati.dataset.clean.text_normalization import grams, said, word_hashes, words
from coati.dataset.rows.source_row import SourceRow

PERMUTATIONS = 128
SHINGLE_WORDS = 3
# Of false candidates, which are looked at again, and of misses, which are lost: at the threshold 2
# to 4% are missed.
WEIGHTS = (0.02, 0.98)
_SCHEME = (
    "affine32"  # how datasketch makes the values; those of one data set must be made the same way
)


def load_datasketch() -> Any:
    """The library, or a ValueError that says how to install it."""
    try:
        import datasketch
    except ImportError as error:
        raise ValueError(
            "near duplicates are found with the package datasketch, which is not here: pip install "
            "'datasketch>=2.0'"
        ) from error
    return datasketch


@cache
def _empty() -> Any:
    return load_datasketch().MinHash(PERMUTATIONS, scheme=_SCHEME, hashfunc=int)


def signature(row: SourceRow | None) -> np.ndarray:
    """(PERMUTATIONS,) uint32 of the row's word trigrams; zeros for no row."""
    if row is None:
        return np.zeros(PERMUTATIONS, dtype=np.uint32)
    texts = said(row)
    found = word_hashes([word for text in texts for word in words(text)])
    if not len(found):
        found = word_hashes(texts)
    shingles = grams(found, min(SHINGLE_WORDS, len(found))) >> np.uint64(32)
    hashed = _empty().copy()
    hashed.update_batch(np.unique(shingles).tolist())
    return np.asarray(hashed.hashvalues, dtype=np.uint32)


class NearIndex:
    """Rows by signature. It takes about 10 kB a row."""

    def __init__(self, threshold: float):
        self.threshold, self._made = threshold, load_datasketch().LeanMinHash
        self._index = load_datasketch().MinHashLSH(
            threshold=threshold, num_perm=PERMUTATIONS, weights=WEIGHTS
        )
        self._signatures: dict[int, np.ndarray] = {}

    def _wrap(self, found: np.ndarray) -> Any:
        return self._made(seed=1, hashvalues=found, scheme=_SCHEME)

    def add(self, row: int, found: np.ndarray) -> None:
        self._signatures[row] = np.array(found)
        self._index.insert(row, self._wrap(found), check_duplication=False)

    def find(self, found: np.ndarray) -> int | None:
        """The earliest row whose estimated Jaccard similarity with ``found`` reaches the
        threshold."""
        near = sorted(self._index.query(self._wrap(found)))
        return next(
            (row for row in near if np.mean(self._signatures[row] == found) >= self.threshold), None
        )
