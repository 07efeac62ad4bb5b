"""Micro-batches by a budget of tokens instead of a number of rows.

The rows of a step are the same however they are cut, and so, up to rounding, are its gradients: the
engine divides by the terms of the whole global batch. A micro-batch takes as many rows as the
budget allows: of a padded model rows x the longest of them, sorted by length so that little of it
is padding; of a padding-free one the real tokens, in the order of the rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from coati.models.logprobs import IGNORE_INDEX
from coati.parallel.objective import Batch, concatenate
from coati.parallel.options import ParallelOptions
from coati.utils.logging import get_logger

logger = get_logger(__name__)

Cuts = list[list[int]]  # the rows of each micro-batch


@dataclass(frozen=True)
class TokenBudget:
    """``tokens`` of a micro-batch. ``padded``: the model gets rows of one width, a multiple of
    ``multiple``. ``aligned``: all ranks must cut into equally many, as each holds collectives."""

    tokens: int
    padded: bool = True
    multiple: int = 1
    aligned: bool = False
    device: torch.device | str = "cpu"

    @classmethod
    def of(cls, options: ParallelOptions, rows: int, longest: int, **how: Any) -> "TokenBudget":
        """``options.tokens_per_batch``, without it what ``rows`` of ``longest`` tokens take;
        ``how``: the other fields."""
        multiple = options.sequence_multiple
        tokens = options.tokens_per_batch or rows * _rounded_up(longest, multiple)
        return cls(tokens, multiple=multiple, **how)

    def cut(self, lengths: Sequence[int], together: int = 1) -> Cuts:
        """Rows of ``lengths`` real tokens, of which every ``together`` consecutive ones stay in one
        micro-batch. Where ``aligned`` every rank must call it."""
        cuts = by_tokens(lengths, self.tokens, together, self.padded, self.multiple)
        self._warn_of_longer(lengths, cuts, together)
        if not self.aligned:
            return cuts
        return with_count(cuts, self._agreed(len(cuts), len(lengths) // together), together)

    def _warn_of_longer(self, lengths: Sequence[int], cuts: Cuts, together: int) -> None:
        alone = (cut for cut in cuts if len(cut) == together)
        longest = max((_cost(lengths, cut, self.padded, self.multiple) for cut in alone), default=0)
        if longest > self.tokens:
            what = "a row" if together == 1 else f"{together} rows that belong together"
            logger.warning_once(
                f"--tokens_per_batch {self.tokens}: {what} of {longest} tokens is a micro-batch of "
                "its own; memory is needed for the longest"
            )

    def _agreed(self, count: int, most: int) -> int:
        """The largest ``count`` of all ranks, but no more than the rank with the fewest rows can
        make."""
        values = torch.tensor([count, -most], device=self.device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        largest, fewest = values.tolist()
        return min(largest, -fewest)


def by_tokens(
    lengths: Sequence[int],
    budget: int,
    together: int = 1,
    padded: bool = True,
    multiple: int = 1,
) -> Cuts:
    """Indices of ``lengths``, every ``together`` consecutive ones in one micro-batch of at most
    ``budget`` tokens; more only where these alone have more.

    ``padded``: tokens are rows x the longest, rounded up to a ``multiple``, and the longest rows
    come first: what does not fit into memory fails at once.
    """
    units = [list(range(start, start + together)) for start in range(0, len(lengths), together)]
    if padded:
        units.sort(key=lambda unit: -max(lengths[row] for row in unit))
    cuts: Cuts = []
    longest = 0  # of the last micro-batch, whose rows have ``total`` tokens
    total = 0
    for unit in units:
        own = [lengths[row] for row in unit]
        longest = max(longest, *own)
        total += sum(own)
        rows = len(unit) + (len(cuts[-1]) if cuts else 0)
        cost = rows * _rounded_up(longest, multiple) if padded else total
        if cuts and cost <= budget:
            cuts[-1] += unit
        else:
            cuts.append(list(unit))
            longest = max(own)
            total = sum(own)
    return cuts if len(cuts) > 1 else [sorted(row for cut in cuts for row in cut)]


def _cost(lengths: Sequence[int], rows: Sequence[int], padded: bool, multiple: int) -> int:
    if not padded:
        return sum(lengths[row] for row in rows)
    return len(rows) * _rounded_up(max(lengths[row] for row in rows), multiple)


def _rounded_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def with_count(cuts: Cuts, count: int, together: int = 1) -> Cuts:
    """``cuts`` as ``count`` micro-batches: the ones of most rows are halved, or the last are put
    together. ``count``: at most the rows / ``together``."""
    cuts = [list(cut) for cut in cuts]
    while len(cuts) < count:
        at = max(range(len(cuts)), key=lambda i: len(cuts[i]))
        middle = (len(cuts[at]) // together + 1) // 2 * together
        cuts[at : at + 1] = [cuts[at][:middle], cuts[at][middle:]]
    while len(cuts) > count:
        last = cuts.pop()
        cuts[-1] += last
    return cuts


def row_lengths(batches: Sequence[Batch]) -> list[int]:
    """The tokens of each row: its real ones, or where one is padded on the left, so that nothing
    can go at the right end, the width of all. To be read where the batches are, before they are
    moved to a device that would have to be waited for."""
    masks = [batch["attention_mask"] for batch in batches]
    if torch.stack([mask[:, 0].bool().all() for mask in masks]).all():
        return torch.cat([mask.sum(1) for mask in masks]).tolist()
    width = max(mask.shape[1] for mask in masks)
    return [width] * sum(map(len, masks))


class RowsOfAStep:
    """All rows of ``batches``, of ``lengths`` (:func:`row_lengths`), from which micro-batches are
    taken. ``token_keys``: keys whose entries are those of the supervised tokens of ``labels``, row
    by row, instead of rows."""

    def __init__(
        self,
        batches: Sequence[Batch],
        lengths: Sequence[int],
        token_keys: Sequence[str] = (),
        multiple: int = 1,
    ) -> None:
        self.batch = batches[0] if len(batches) == 1 else concatenate(list(batches))
        self.lengths = lengths
        self.token_keys = [key for key in token_keys if key in self.batch]
        self.multiple = multiple
        self.width = self.batch["input_ids"].shape[1]
        self._starts: list[int] | None = None

    def take(self, rows: Sequence[int]) -> Batch:
        """The micro-batch of ``rows``, as wide as the longest of them needs."""
        device = self.batch["input_ids"].device
        index = torch.tensor(rows, device=device)
        longest = max(2, *(self.lengths[row] for row in rows))
        width = min(self.width, _rounded_up(longest, self.multiple))
        taken = {}
        for key, values in self.batch.items():
            if key in self.token_keys:
                taken[key] = values[self._tokens(rows, device)]
                continue
            found = values.index_select(0, index)
            if found.dim() > 1 and found.shape[1] == self.width:
                found = found[:, :width]
            taken[key] = found
        return taken

    def _tokens(self, rows: Sequence[int], device: torch.device) -> Tensor:
        if self._starts is None:
            counts = (self.batch["labels"][:, 1:] != IGNORE_INDEX).sum(1)
            self._starts = [0, *counts.cumsum(0).tolist()]
        starts = self._starts
        return torch.cat(
            [torch.arange(starts[row], starts[row + 1], device=device) for row in rows]
        )


def restored(found: Sequence[Tensor], cuts: Cuts) -> Tensor:
    """(R,) one number per row, from those of each micro-batch, in the order of the rows."""
    flat = torch.cat(list(found))
    order = torch.tensor([row for cut in cuts for row in cut], device=flat.device)
    return torch.empty_like(flat).index_copy_(0, order, flat)
