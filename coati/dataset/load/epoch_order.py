"""Which rows an epoch trains on, and in which order: a function of seed, epoch and rows alone.

Neither the number of processes nor the size of a batch changes it, so a position in it is all that
a resumed run needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from coati.dataset.load.packing import packs, padding_share

# Rows are sorted by length inside blocks of this many shuffled rows, then handed out in groups of
# similar length.
BLOCK_ROWS = 1024
GROUP_ROWS = 16
# Sorted exactly, few rows would have the same neighbors in every epoch: lengths are blurred, the
# more the fewer.
BLUR = 2.0
LARGEST_BLUR = 0.25
_MIXTURE = 0x6D6978  # keeps the draws of a mixture apart from those of the order


def epoch_order(
    lengths: np.ndarray, seed: int, epoch: int, shuffle: bool = True, group_by_length: bool = True
) -> np.ndarray:
    """(N,) row indices of one epoch.

    Grouped by length, neighbors need little padding while the groups stay in random order and
    other rows of like length meet in each epoch.
    """
    if not shuffle:
        return np.arange(len(lengths))
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    if not group_by_length or not len(lengths):
        return order
    spread = min(LARGEST_BLUR, BLUR / np.sqrt(len(lengths)))
    blurred = lengths * np.exp(random.uniform(-spread, spread, len(lengths)))
    groups = []
    rest = []
    for start in range(0, len(order), BLOCK_ROWS):
        block = order[start : start + BLOCK_ROWS]
        block = block[np.argsort(blurred[block], kind="stable")]
        # Rows that fill no group come last, where they shift no batch; which lengths that meets is
        # drawn.
        over = len(block) % GROUP_ROWS
        at = int(random.integers(len(block) // GROUP_ROWS + 1)) * GROUP_ROWS
        rest.append(block[at : at + over])
        groups.append(np.delete(block, np.s_[at : at + over]).reshape(-1, GROUP_ROWS))
    return np.concatenate([random.permutation(np.concatenate(groups)).ravel(), *rest])


def ordered_entries(
    lengths: np.ndarray,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    group_by_length: bool = True,
    pack_length: int | None = None,
) -> Sequence[np.ndarray] | np.ndarray:
    """(rows,) indices of one epoch as :func:`epoch_order`, or an array of indices for each pack of
    at most ``pack_length`` tokens."""
    if pack_length is None:
        return epoch_order(lengths, seed, epoch, shuffle, group_by_length)
    random = np.random.default_rng([seed, epoch]) if shuffle else None
    found = packs(lengths, pack_length, random)
    full = np.asarray([lengths[pack].sum() for pack in found])
    return [found[i] for i in epoch_order(full, seed, epoch, shuffle, group_by_length)]


@dataclass(frozen=True)
class Mixture:
    """Several sets laid end to end, drawn from with relative frequencies.

    An epoch has as many rows as all sets together; set i has the share ``weights[i] /
    sum(weights)`` of them, rounded so that the sum is kept. A set gives each of its rows once
    before it gives any again, over the epochs too: a row is never used twice more often than
    another of its set.

    Raises:
        ValueError: when there are not as many weights as sets, or a weight leaves its set without a
            row.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.sizes):
            raise ValueError(
                f"--dataset_weights has {len(self.weights)} values "
                f"({' '.join(f'{w:g}' for w in self.weights)}), --dataset has {len(self.sizes)} "
                f"paths ({' '.join(self.names)}); give one weight for each path"
            )
        for name, weight, count in zip(self.names, self.weights, self.counts(), strict=True):
            if not count:
                raise ValueError(
                    f"--dataset_weights {weight:g}: {name} would not give a single one of the "
                    f"{sum(self.sizes)} rows of an epoch; raise this weight, or leave the path and "
                    "its weight out"
                )

    def counts(self) -> list[int]:
        """Rows of each set in an epoch (largest remainders are rounded up)."""
        total = sum(self.sizes)
        weight = sum(self.weights)
        exact = [total * one / weight for one in self.weights]
        counts = [int(share) for share in exact]
        by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
        for i in by_remainder[: total - sum(counts)]:
            counts[i] += 1
        return counts

    def rows(self, seed: int, epoch: int) -> np.ndarray:
        """(sum of sizes,) row indices of an epoch, set by set."""
        drawn = []
        first = 0
        for number, (size, count) in enumerate(zip(self.sizes, self.counts(), strict=True)):
            start = epoch * count
            passes = range(start // size, -(-(start + count) // size))
            endless = np.concatenate(
                [
                    np.random.default_rng([_MIXTURE, seed, number, each]).permutation(size)
                    for each in passes
                ]
            )
            start -= passes[0] * size
            drawn.append(first + endless[start : start + count])
            first += size
        return np.concatenate(drawn)

    def describe(self) -> str:
        """One line: what each set gives to an epoch."""
        sets = zip(self.names, self.sizes, self.counts(), strict=True)
        parts = [
            f"{count} of {name} ({size} rows, each {count / size:.3g} times)"
            for name, size, count in sets
        ]
        return f"--dataset_weights: of the {sum(self.sizes)} rows of an epoch, {', '.join(parts)}"


class EpochOrder:
    """The entries of each epoch, in order: rows, or packs of rows.

    Args:
        lengths: (N,) tokens of each row of the data set.
        mixture: draws an epoch's rows from several sets; None: every row once.
        pack_length: tokens that a pack may hold, to which longer rows are truncated; None: no
            packing.
        fill: entries of an optimizer step that blank ones fill up at the end of an epoch, so that
            its last rows are not left out; 1: they are.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        seed: int = 42,
        shuffle: bool = True,
        group_by_length: bool = True,
        mixture: Mixture | None = None,
        pack_length: int | None = None,
        fill: int = 1,
    ) -> None:
        self.fill = fill
        self.lengths = lengths if pack_length is None else np.minimum(lengths, pack_length)
        self.seed = seed
        self.shuffle = shuffle
        self.group_by_length = group_by_length
        self.mixture = mixture
        self.pack_length = pack_length
        self.entries = lru_cache(maxsize=2)(self._entries)

    def count(self, epoch: int) -> int:
        """Entries of ``epoch``, as many blank ones after them as a step can need. Packs of a
        mixture are not equally many in every epoch."""
        return self._held(epoch) + self.fill - 1

    def _held(self, epoch: int) -> int:
        if self.pack_length is None:
            return len(self.lengths)
        return len(self.entries(epoch if self.mixture else 0))

    def _entries(self, epoch: int) -> Sequence[np.ndarray] | np.ndarray:
        """(rows,) indices, or an array of indices for each pack."""
        chosen = None if self.mixture is None else self.mixture.rows(self.seed, epoch)
        lengths = self.lengths if chosen is None else self.lengths[chosen]
        found = ordered_entries(
            lengths, self.seed, epoch, self.shuffle, self.group_by_length, self.pack_length
        )
        if chosen is None:
            return found
        return chosen[found] if self.pack_length is None else [chosen[pack] for pack in found]

    def packing_figures(self, batch_size: int) -> dict[str, float]:
        """Of the first epoch: rows per pack, and the share of padding in batches of packs and in
        batches of rows; empty without packing."""
        if self.pack_length is None:
            return {}
        found = self.entries(0)
        rows = np.concatenate(found)
        unpacked = rows[epoch_order(self.lengths[rows], self.seed, 0)]
        padding = padding_share([self.lengths[pack].sum() for pack in found], batch_size)
        before = padding_share(self.lengths[unpacked], batch_size)
        return {
            "packing/rows_per_pack": len(rows) / len(found),
            "packing/padding": padding,
            "packing/padding_unpacked": before,
            "packing/padding_saved": before - padding,
        }

    def describe_packing(self, batch_size: int) -> str:
        """One line with :meth:`packing_figures`."""
        figures = self.packing_figures(batch_size)
        found = self.entries(0)
        return (
            f"--packing: {sum(map(len, found))} rows in {len(found)} packs of up to "
            f"{self.pack_length} tokens, {figures['packing/rows_per_pack']:.1f} rows a pack; of "
            f"the positions of a batch {figures['packing/padding']:.1%} hold padding, "
            f"{figures['packing/padding_unpacked']:.1%} without packing"
        )
