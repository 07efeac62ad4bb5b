"""Near duplicates by MinHash signatures and locality-sensitive hashing, both of datasketch.

Broder 1997 (MinHash); Indyk and Motwani 1998 (LSH).
"""

from functools import cache
from typing import Any

import numpy as np

from coati.dataset.clean.text_normalization import ngram_hashes, spoken_texts, word_hashes, words
from coati.dataset.rows.source_row import SourceRow

PERMUTATIONS = 128
SHINGLE_WORDS = 3
# Of false positives, which are checked again, and of false negatives, which are lost: at the
# threshold 2 to 4% are missed.
WEIGHTS = (0.02, 0.98)
_SCHEME = "affine32"  # of datasketch's hash functions; one for all signatures of a data set


def load_datasketch() -> Any:
    """The library, or a ValueError that says how to install it."""
    try:
        import datasketch
    except ImportError as error:
        raise ValueError(
            "near duplicates are found with the package datasketch, which is not installed: pip "
            "install 'datasketch>=2.0'"
        ) from error
    return datasketch


@cache
def _empty() -> Any:
    return load_datasketch().MinHash(PERMUTATIONS, scheme=_SCHEME, hashfunc=int)


def signature(row: SourceRow | None) -> np.ndarray:
    """(PERMUTATIONS,) uint32 of the row's word trigrams; zeros for no row."""
    if row is None:
        return np.zeros(PERMUTATIONS, dtype=np.uint32)
    texts = spoken_texts(row)
    found = word_hashes([word for text in texts for word in words(text)])
    if not len(found):  # punctuation alone
        found = word_hashes(texts)
    shingles = ngram_hashes(found, min(SHINGLE_WORDS, len(found))) >> np.uint64(32)
    hashed = _empty().copy()
    hashed.update_batch(np.unique(shingles).tolist())
    return np.asarray(hashed.hashvalues, dtype=np.uint32)


class LshIndex:
    """Rows by signature. It takes about 10 kB a row."""

    def __init__(self, threshold: float):
        self.threshold = threshold
        self._minhash = load_datasketch().LeanMinHash
        self._index = load_datasketch().MinHashLSH(
            threshold=threshold, num_perm=PERMUTATIONS, weights=WEIGHTS
        )
        self._signatures: dict[int, np.ndarray] = {}

    def _wrap(self, found: np.ndarray) -> Any:
        return self._minhash(seed=1, hashvalues=found, scheme=_SCHEME)

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
