"""The tokens of each row so far, in buffers that grow, and what each step needs to know of them."""

import torch
import torch.nn.functional as F
from torch import Tensor

ROOM = 256  # columns that are added at a time, or half of those held where that is more


class History:
    """Tokens ``ids`` and ``mask`` (rows, columns), int64, 0 on the padding on the left.

    ``lengths`` (rows,): tokens of each row. ``padded``: whether any column of any row is padding.
    """

    def __init__(self, ids: Tensor, mask: Tensor) -> None:
        self._hold(ids, mask.long())

    def _hold(self, ids: Tensor, mask: Tensor) -> None:
        self.columns = ids.shape[1]
        self._ids = ids
        self._mask = mask
        self.lengths = mask.sum(dim=1)
        self.padded = not bool(mask.all())
        self._blocked: Tensor | None = None

    @property
    def ids(self) -> Tensor:
        """(rows, columns): the tokens of each row."""
        return self._ids[:, : self.columns]

    @property
    def mask(self) -> Tensor:
        """(rows, columns): 0 on the padding, else 1."""
        return self._mask[:, : self.columns]

    @property
    def last(self) -> Tensor:
        """(rows,): the newest token of each."""
        return self._ids[:, self.columns - 1]

    @property
    def positions(self) -> Tensor:
        """(rows,): those of the newest tokens."""
        return self.lengths - 1

    def blocked(self) -> Tensor | None:
        """What to add to attention scores, (rows, columns) fp32: -inf on the padding; None where
        there is none."""
        if not self.padded:
            return None
        if self._blocked is None:
            self._blocked = torch.zeros(self._mask.shape, device=self._mask.device)
            self._blocked[:, : self.columns].masked_fill_(self.mask == 0, -torch.inf)
        return self._blocked[:, : self.columns]

    def append(self, tokens: Tensor) -> None:
        """One more token (rows,) of each."""
        if self.columns == self._ids.shape[1]:
            room = max(ROOM, self.columns // 2)
            self._ids = F.pad(self._ids, (0, room))
            self._mask = F.pad(self._mask, (0, room), value=1)  # each will hold a token
            if self._blocked is not None:
                self._blocked = F.pad(self._blocked, (0, room))
        self._ids[:, self.columns] = tokens
        self.columns += 1
        self.lengths = self.lengths + 1

    def keep(self, survivors: Tensor) -> None:
        """Row i becomes row ``survivors[i]``."""
        self._hold(self.ids[survivors], self.mask[survivors])

    def join(self, other: "History") -> None:
        """The rows of ``other`` below these."""
        columns = max(self.columns, other.columns)
        self._hold(
            _stack_left_padded(self.ids, other.ids, columns),
            _stack_left_padded(self.mask, other.mask, columns),
        )

    def padding(self) -> int:
        """Columns on the left that are padding in every row."""
        return self.columns - int(self.lengths.max()) if self.padded else 0

    def drop(self, columns: int) -> None:
        """The first ``columns``, which are padding, no longer count."""
        self._hold(self.ids[:, columns:], self.mask[:, columns:])


def _stack_left_padded(first: Tensor, second: Tensor, columns: int) -> Tensor:
    """Concatenate the rows of two batches, padded on the left with 0 to ``columns``."""
    return torch.cat([F.pad(part, (columns - part.shape[1], 0)) for part in (first, second)])
