"""The global batches of a stream, as GlobalBatchLoader cuts those of prepared rows."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from coati.dataset.stream.row_stream import RowStream, Window, as_lists

ENDLESS = 2**62  # rows of an epoch whose end is not known; epochs of a run that steps end
Entry = tuple[Window, Any]


class StreamLoader:
    """``accumulation_steps`` micro-batches for this data-parallel rank, for each optimizer step.

    Every rank makes all rows and takes its slice of the same ``batch_size x accumulation_steps x
    dp_size`` entries: rows, or packs of rows. Nothing is left out at the end of an epoch: its last
    rows share a global batch with the first of the next one.

    Args:
        collate: rows to tensors; of a stream that packs, lists of rows (PackCollator).
        partners: each row comes with the response of the row after it in the global batch as
            ``kl_completion`` (for KTO's baseline).
    """

    def __init__(
        self,
        stream: RowStream,
        collate: Callable[[list], dict],
        *,
        batch_size: int,
        accumulation_steps: int = 1,
        dp_rank: int = 0,
        dp_size: int = 1,
        partners: bool = False,
    ) -> None:
        self.stream = stream
        self.collate = collate
        self.batch_size = batch_size
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.partners = partners
        self.rows_per_step = batch_size * accumulation_steps * dp_size
        self.figures: dict[str, float] = {}
        self._batch: list[Entry] = []
        self._state: dict[str, Any] = {}
        self._position = (0, 0)

    def count(self, epoch: int) -> int:
        """Unknown before it is read."""
        return ENDLESS

    def position_after(self, epoch: int, start: int) -> tuple[int, int]:
        """The epoch of the entry after the last global batch, and how many of that epoch are
        done."""
        return self._position

    def state_dict(self) -> dict[str, Any]:
        """Where a resumed run's stream goes on, after the last global batch."""
        return self._state

    def global_batches(self, epoch: int, start_row: int = 0) -> Iterator[list[dict]]:
        """This rank's micro-batches of each step, without end, from where the stream stands, which
        is entry ``start_row`` of ``epoch``."""
        self._position = (epoch, start_row)
        windows = self.stream.windows()
        window = next(windows)
        entry = self.stream.entry
        while True:
            batch: list[Entry] = []
            while len(batch) < self.rows_per_step:
                if entry >= len(window.entries):
                    window = next(windows)
                    entry = 0
                taken = window.entries[entry : entry + self.rows_per_step - len(batch)]
                batch += [(window, one) for one in taken]
                entry += len(taken)
                self._advance(window, entry, len(taken))
            self._batch = batch
            self._state = window.state | {"entry": entry}
            yield [self._collated(mine) for mine in self._mine()]

    def _advance(self, window: Window, entry: int, taken: int) -> None:
        epoch, done = self._position
        if window.epoch > epoch:  # the last rows of the one before were all left out
            epoch = window.epoch
            done = 0
        at_end = entry == len(window.entries) and window.next_epoch > epoch
        self._position = (window.next_epoch, 0) if at_end else (epoch, done + taken)

    def _mine(self) -> list[list[Entry]]:
        batch = _with_partners(self._batch) if self.partners else self._batch
        size = self.batch_size
        starts = range(self.dp_rank * size, len(batch), self.dp_size * size)
        return [batch[start : start + size] for start in starts]

    def _collated(self, mine: list[Any]) -> dict:
        if self.partners:
            return self.collate([_with_response(*pair) for pair in mine])
        if self.stream.options.pack_length is not None:
            return self.collate([[_row(window, row) for row in pack] for window, pack in mine])
        return self.collate([_row(*entry) for entry in mine])

    def rows_at(self, epoch: int, start_row: int) -> list[str]:
        """The places of the rows of the last global batch, on all ranks together."""
        return [
            window.places[int(row)] for window, entry in self._batch for row in np.atleast_1d(entry)
        ]


def _row(window: Window, row: Any) -> dict[str, Any]:
    return as_lists(window.rows[int(row)])


def _with_partners(batch: list[Entry]) -> list[tuple[Entry, Entry | None]]:
    following = [*batch[1:], *batch[:1]] if len(batch) > 1 else [None]
    return list(zip(batch, following, strict=True))


def _with_response(entry: Entry, partner: Entry | None) -> dict[str, Any]:
    response = _row(*partner)["completion"] if partner is not None else []
    return _row(*entry) | {"kl_completion": response}
