"""Packs: several rows in one sequence, with positions that start anew at each, so that short rows
leave no padding."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from coati.dataset.load.collator import attention_mask, pad, supervise_all

_EXCHANGES = (
    40  # rounds of :func:`exchange`: enough for other company, little beside the packing itself
)


def best_fit_decreasing(
    lengths: np.ndarray, limit: int, random: np.random.Generator | None = None
) -> np.ndarray:
    """(N,) lengths of at least 1 -> (N,) number of the pack that each row goes into, no pack above
    ``limit`` in all.

    Best-fit decreasing (Johnson, 1973: at most 11/9 of the least possible number, plus 4): the
    longest rows first, each into the pack that it leaves the least room in. Which of several rows
    of equal length comes first is drawn from ``random``; the number of packs does not depend on
    that.

    Raises:
        ValueError: for a row above ``limit``.
    """
    if len(lengths) and int(lengths.max()) > limit:
        raise ValueError(
            f"a row of {int(lengths.max())} tokens does not fit into a pack of {limit}"
        )
    ties = np.arange(len(lengths)) if random is None else random.permutation(len(lengths))
    pack_of = np.empty(len(lengths), dtype=np.int64)
    by_room: dict[int, list[int]] = {}  # packs by the room they have left
    rooms: list[int] = []  # the keys, sorted
    values = lengths.tolist()
    count = 0
    for row in np.lexsort((ties, -lengths)).tolist():
        at = bisect_left(rooms, values[row])
        if at == len(rooms):
            pack, room, count = count, limit, count + 1
        else:
            room = rooms[at]
            pack = by_room[room].pop()
            if not by_room[room]:
                del rooms[at]
        left = room - values[row]
        if left and not by_room.setdefault(left, []):
            insort(rooms, left)
        if left:
            by_room[left].append(pack)
        pack_of[row] = pack
    return pack_of


def exchange(
    pack_of: np.ndarray, lengths: np.ndarray, limit: int, random: np.random.Generator
) -> np.ndarray:
    """The same packs with rows of like length exchanged where there is room, so that other rows
    meet in each epoch.

    All of a round's exchanges are made at once; the tokens that come into a pack are counted, those
    that leave it not.
    """
    pack_of = pack_of.copy()
    by_length = np.lexsort((random.permutation(len(lengths)), lengths))
    for _ in range(_EXCHANGES):
        shift = int(random.integers(1, 9))
        first = np.arange(int(random.integers(2 * shift)), max(len(lengths) - shift, 0))
        first = first[(first - first[:1]) // shift % 2 == 0]  # every row in one pair at most
        short = by_length[first]
        long = by_length[first + shift]
        more = lengths[long] - lengths[short]
        room = limit - np.bincount(pack_of, weights=lengths)
        taken = np.bincount(pack_of[short], weights=more, minlength=len(room))
        fits = (taken <= room)[pack_of[short]]
        short, long = short[fits], long[fits]
        pack_of[short], pack_of[long] = pack_of[long], pack_of[short]
    return pack_of


def packs(
    lengths: np.ndarray, limit: int, random: np.random.Generator | None = None
) -> list[np.ndarray]:
    """Row indices of each pack: every row once, at most ``limit`` tokens a pack, as few packs as
    best fit needs.

    With ``random`` the company of each row is drawn; the number of packs stays the same.
    """
    pack_of = best_fit_decreasing(lengths, limit, random)
    if random is not None:
        pack_of = exchange(pack_of, lengths, limit, random)
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
    """Packs, lists of rows, to ``input_ids, attention_mask, labels, position_ids``, each (B, S),
    one pack a row.

    ``position_ids`` are 0 where a row begins and on padding, so they say which tokens belong
    together. The first token of a row has no label: what stands before it in the pack must not be
    asked to predict it.

    Args: collate: the collator for single rows (DataCollatorForSupervisedDataset), whose settings
        are taken over.
    """

    def __init__(self, collate: Any) -> None:
        self.rows = collate

    def __call__(self, packed: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Tensor]:
        rows = self.rows
        pieces = [[row["input_ids"][: rows.max_length] for row in pack] for pack in packed]
        ids = [_joined(pack) for pack in pieces]
        lengths = [len(pack) for pack in ids]
        width = -(-max(lengths) // rows.multiple) * rows.multiple
        labels = [
            _joined([[rows.ignore_index, *row["labels"][1 : rows.max_length]] for row in pack])
            for pack in packed
        ]
        positions = [_joined([range(len(piece)) for piece in pack]) for pack in pieces]
        batch = {
            "input_ids": pad(ids, width, rows.pad_id),
            "attention_mask": attention_mask(lengths, width),
            "labels": pad(labels, width, rows.ignore_index),
            "position_ids": pad(positions, width, 0),
        }
        if rows.apply_loss_mask:
            return batch
        return supervise_all(batch, [False] * len(packed), rows.ignore_index)


def _joined(pieces: Sequence[Sequence[int]]) -> list[int]:
    return [token for piece in pieces for token in piece]
