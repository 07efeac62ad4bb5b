"""Packing: several rows in one sequence, whose position ids restart at each row, so that short rows
leave little padding."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from coati.dataset.load.collator import (
    attention_mask,
    pad,
    pad_weights,
    supervise_all,
    weights_of,
)

# Rounds of :func:`swap_rows`: enough that packs differ between epochs, and still cheap.
_SWAP_ROUNDS = 40


def best_fit_decreasing(
    lengths: np.ndarray, limit: int, random: np.random.Generator | None = None
) -> np.ndarray:
    """(N,) lengths of at least 1 -> (N,) index of the pack of each row, where the lengths of a pack
    add up to at most ``limit``.

    Best-fit decreasing (Johnson, 1973: at most 11/9 OPT + 4 packs): the longest rows first, each
    into the pack that it leaves the least room in. Which of several rows
    of equal length comes first is drawn from ``random``; the number of packs does not depend on
    that.

    Raises:
        ValueError: for a row above ``limit``.
    """
    if len(lengths) and int(lengths.max()) > limit:
        raise ValueError(
            f"a row of {int(lengths.max())} tokens does not fit into a pack of {limit} tokens"
        )
    ties = np.arange(len(lengths)) if random is None else random.permutation(len(lengths))
    pack_of = np.empty(len(lengths), dtype=np.int64)
    by_room: dict[int, list[int]] = {}  # packs by the room they have left
    rooms: list[int] = []  # the keys, sorted
    values = lengths.tolist()
    count = 0
    for row in np.lexsort((ties, -lengths)).tolist():
        tightest = bisect_left(rooms, values[row])
        if tightest == len(rooms):
            pack = count
            room = limit
            count += 1
        else:
            room = rooms[tightest]
            pack = by_room[room].pop()
            if not by_room[room]:
                del rooms[tightest]
        left = room - values[row]
        if left and not by_room.setdefault(left, []):
            insort(rooms, left)
        if left:
            by_room[left].append(pack)
        pack_of[row] = pack
    return pack_of


def swap_rows(
    pack_of: np.ndarray, lengths: np.ndarray, limit: int, random: np.random.Generator
) -> np.ndarray:
    """``pack_of`` (N,) with rows of similar length swapped between packs that have room, so that
    the rows of a pack differ between epochs.

    The swaps of a round are made at once. Against the room of a pack only the tokens that it gains
    are counted, not those that it loses, so no pack ever exceeds ``limit``.
    """
    pack_of = pack_of.copy()
    by_length = np.lexsort((random.permutation(len(lengths)), lengths))
    for _ in range(_SWAP_ROUNDS):
        shift = int(random.integers(1, 9))
        first = np.arange(int(random.integers(2 * shift)), max(len(lengths) - shift, 0))
        first = first[(first - first[:1]) // shift % 2 == 0]  # a row is in one pair at most
        short = by_length[first]
        long = by_length[first + shift]
        gain = lengths[long] - lengths[short]
        room = limit - np.bincount(pack_of, weights=lengths)
        gained = np.bincount(pack_of[short], weights=gain, minlength=len(room))
        fits = (gained <= room)[pack_of[short]]
        short, long = short[fits], long[fits]
        pack_of[short], pack_of[long] = pack_of[long], pack_of[short]
    return pack_of


def packs(
    lengths: np.ndarray, limit: int, random: np.random.Generator | None = None
) -> list[np.ndarray]:
    """Row indices of each pack: every row once, at most ``limit`` tokens per pack, packed best-fit
    decreasing.

    With ``random`` it is random which rows share a pack; the number of packs does not change.
    """
    pack_of = best_fit_decreasing(lengths, limit, random)
    if random is not None:
        pack_of = swap_rows(pack_of, lengths, limit, random)
    ends = np.cumsum(np.bincount(pack_of))[:-1]
    return np.split(np.argsort(pack_of, kind="stable"), ends) if len(lengths) else []


def padding_share(widths: Sequence[int] | np.ndarray, batch_size: int) -> float:
    """Share of positions that hold padding when sequences of these lengths are batched in this
    order."""
    widths = np.asarray(widths)
    starts = np.arange(0, len(widths), batch_size)
    longest = np.maximum.reduceat(widths, starts)
    return 1.0 - float(widths.sum()) / float((longest * np.diff([*starts, len(widths)])).sum())


class PackCollator:
    """B packs (lists of rows) -> ``input_ids, attention_mask, labels, position_ids``, each (B, S),
    and ``loss_weights`` (B, S) fp32 where a row has them.

    ``position_ids`` restart at 0 with each row of a pack and are 0 on padding, which tells the rows
    apart. The first token of a row has no label: the row before it must not be trained to predict
    it.

    Args:
        collate: the :class:`~coati.dataset.load.collator.DataCollatorForSupervisedDataset` whose
            settings are used.
    """

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, packed: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Tensor]:
        settings = self.collate
        ignored = settings.ignore_index
        limit = settings.max_length
        row_ids = [[row["input_ids"][:limit] for row in pack] for pack in packed]
        ids = [_concatenated(pack) for pack in row_ids]
        lengths = [len(pack) for pack in ids]
        width = -(-max(lengths) // settings.multiple) * settings.multiple
        labels = [
            _concatenated([[ignored, *row["labels"][1:limit]] for row in pack]) for pack in packed
        ]
        positions = [_concatenated([range(len(row)) for row in pack]) for pack in row_ids]
        batch = {
            "input_ids": pad(ids, width, settings.pad_id),
            "attention_mask": attention_mask(lengths, width),
            "labels": pad(labels, width, ignored),
            "position_ids": pad(positions, width, 0),
        }
        if any(row.get("loss_weights") is not None for pack in packed for row in pack):
            weights = [
                [one for row, ids in zip(*pair, strict=True) for one in weights_of(row, len(ids))]
                for pair in zip(packed, row_ids, strict=True)
            ]
            batch["loss_weights"] = pad_weights(weights, width)
        if settings.apply_loss_mask:
            return batch
        blank = [bool(pack[0].get("blank")) for pack in packed]
        return supervise_all(batch, blank, ignored)

    def blank(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """A pack in which nothing is supervised."""
        return [self.collate.blank(row)]


def _concatenated(parts: Sequence[Sequence[int]]) -> list[int]:
    return [token for part in parts for token in part]
