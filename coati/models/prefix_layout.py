"""Rows that begin alike in one sequence: what they share once, then what follows in each.

The two responses of a preference pair, the group of a prompt in GRPO, conversations under one
system prompt: a tree, whose branches are laid out depth first. A model then computes the hidden
states of a shared prefix once; each row reads them, and their gradients add up there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class PrefixLayout:
    """P tokens in place of the T of some rows.

    ``source`` (P,): which of the T tokens each is. ``places`` (T,): where each of the T is among
    the P. ``ends``: of the segments, the first being 0; each attends causally to itself.
    ``prefixes``: (start, end, stop) of each segment that others continue: tokens from ``end`` up to
    ``stop`` attend to all those from ``start`` up to ``end`` as well.
    """

    source: Tensor
    places: Tensor
    ends: list[int]
    prefixes: list[tuple[int, int, int]]


def prefix_layout(ids: Tensor, lengths: Sequence[int], least: int) -> PrefixLayout | None:
    """The layout of the rows of ``lengths`` in ``ids`` (T,); None where no two of them are equal or
    begin with the same ``least`` tokens. Rows that share nothing stay in their order."""
    tokens = ids.cpu().numpy()
    starts = np.cumsum([0, *lengths]).tolist()
    equal: dict[tuple[int, ...], list[int]] = {}
    for start, end in pairwise(starts):
        equal.setdefault(tuple(tokens[start:end].tolist()), []).append(start)
    rows = [_Row(equal[key], len(key)) for key in sorted(equal)]
    common = [
        _common(tokens, one.starts[0], other.starts[0], min(one.length, other.length))
        for one, other in pairwise(rows)
    ]
    if len(rows) == len(lengths) and max(common, default=0) < least:
        return None
    tree = _Tree(rows, common, least, len(tokens))
    tree.lay(0, len(rows), 0)
    source = torch.from_numpy(np.concatenate(tree.sources))
    return PrefixLayout(source, torch.from_numpy(tree.places), tree.ends, tree.prefixes)


def _common(tokens: np.ndarray, one: int, other: int, count: int) -> int:
    """How many tokens from ``one`` and from ``other`` on are alike, at most ``count``."""
    differ = tokens[one : one + count] != tokens[other : other + count]
    return int(differ.argmax()) if differ.any() else count


class _Row(NamedTuple):
    """Equal rows: where each begins."""

    starts: list[int]
    length: int


class _Tree:
    """Lays out distinct rows in the order of their tokens, of which ``common`` counts the tokens
    that neighbors begin with alike."""

    def __init__(self, rows: list[_Row], common: list[int], least: int, total: int) -> None:
        self.rows = rows
        self.common = common
        self.least = least
        self.places: np.ndarray = np.zeros(total, dtype=np.int64)
        self.sources: list[np.ndarray] = []
        self.ends = [0]
        self.prefixes: list[tuple[int, int, int]] = []

    def lay(self, low: int, high: int, depth: int) -> None:
        """The rows from ``low`` up to ``high``, whose first ``depth`` tokens are laid."""
        members = self.rows[low:high]
        if len(members) == 1:
            self._segment(members, depth, members[0].length)
            return
        shared = min(self.common[low : high - 1])
        start = self.ends[-1]
        if shared - depth >= self.least:
            self._segment(members, depth, shared)
            depth = shared
        end = self.ends[-1]
        apart = [
            index + 1 for index in range(low, high - 1) if self.common[index] - depth < self.least
        ]
        for branch in sorted(pairwise([low, *apart, high]), key=self._first):
            self.lay(*branch, depth)
        stop = self.ends[-1]
        if start < end < stop:
            self.prefixes.append((start, end, stop))

    def _first(self, branch: tuple[int, int]) -> int:
        return min(row.starts[0] for row in self.rows[slice(*branch)])

    def _segment(self, members: list[_Row], depth: int, end: int) -> None:
        """Tokens ``depth`` up to ``end`` of the rows ``members``, which share them."""
        if depth == end:
            return
        at = self.ends[-1]
        self.ends.append(at + end - depth)
        for start in chain.from_iterable(row.starts for row in members):
            self.places[start + depth : start + end] = np.arange(at, self.ends[-1])
        first = members[0].starts[0]
        self.sources.append(np.arange(first + depth, first + end))
