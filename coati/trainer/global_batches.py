"""Loaders as sequences of global batches: the library's own unchanged, a plain DataLoader's
batches grouped by ``accumulation_steps``."""

from collections.abc import Callable, Iterator
from itertools import islice

from coati.parallel.checkpoint import RunningState


class GroupedDataLoader:
    """Global batches of ``accumulation_steps`` consecutive batches of a plain DataLoader. Positions
    count this rank's batches (``counts_batches``).

    Raises:
        ValueError: for a loader with fewer batches than one optimizer step takes.
    """

    counts_batches = True

    def __init__(self, loader, accumulation_steps: int) -> None:
        self.loader = loader
        self.accumulation_steps = accumulation_steps
        self.rows_per_step = accumulation_steps
        self.figures: dict[str, float] = {}
        if len(self) == 0:
            raise ValueError(
                f"the loader has {len(loader)} batches, fewer than the {accumulation_steps} of one "
                "optimizer step; pass more data or lower accumulation_steps"
            )

    def __len__(self) -> int:
        return len(self.loader) // self.accumulation_steps

    def count(self, epoch: int) -> int:
        """Batches of ``epoch``, the same number in each."""
        return len(self.loader)

    def global_batches(self, epoch: int, start: int = 0) -> Iterator[list[dict]]:
        """This rank's micro-batches of each optimizer step of ``epoch``, from position ``start``
        on."""
        if hasattr(getattr(self.loader, "sampler", None), "set_epoch"):
            self.loader.sampler.set_epoch(epoch)
        batches = islice(iter(self.loader), start, None)
        size = self.accumulation_steps
        while len(micro_batches := list(islice(batches, size))) == size:
            yield micro_batches

    def position_after(self, epoch: int, start: int) -> tuple[int, int]:
        """Where the step after the one at ``start`` of ``epoch`` begins."""
        return epoch, start + self.rows_per_step

    def rows_at(self, epoch: int, start: int) -> list[int]:
        """Positions of the batches; a plain DataLoader does not reveal its row indices."""
        return list(range(start, start + self.accumulation_steps))


def as_global_batches(loader, accumulation_steps: int):
    """``loader`` itself if it has global batches, else a :class:`GroupedDataLoader` of it."""
    return (
        loader
        if hasattr(loader, "global_batches")
        else GroupedDataLoader(loader, accumulation_steps)
    )


def total_steps(
    state: RunningState,
    count: Callable[[int], int],
    rows_per_step: int,
    max_epochs: int,
    max_steps: int | None = None,
) -> int:
    """Optimizer steps of the whole run, those already done by ``state`` included.

    ``count``: epoch -> rows (or packs) of that epoch. This is not max_epochs x steps per epoch
    where a run is resumed with another global batch size.
    """
    if state.epoch >= max_epochs:
        return state.step
    most = max_steps or 2**62
    total = state.step + max(count(state.epoch) - state.sample_start_index, 0) // rows_per_step
    for epoch in range(state.epoch + 1, max_epochs):
        if total >= most:  # a stream does not know how many its epochs have, nor how many there are
            break
        total += count(epoch) // rows_per_step
    return min(total, most)
