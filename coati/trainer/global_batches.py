"""Any loader as a sequence of global batches: the library's own as it is, a plain DataLoader
grouped into ``accumulation_steps`` micro-batches."""

from collections.abc import Callable, Iterator
from itertools import islice

from coati.parallel.checkpoint import RunningState


class DataLoaderWindows:
    """Windows of ``accumulation_steps`` batches of an ordinary DataLoader; positions count this
    rank's batches."""

    def __init__(self, loader, accumulation_steps: int) -> None:
        self.loader = loader
        self.accumulation_steps = accumulation_steps
        self.rows_per_step = accumulation_steps
        self.figures: dict[str, float] = {}
        if len(self) == 0:
            raise ValueError(
                f"the loader has {len(loader)} batches, one step needs accumulation_steps "
                f"{accumulation_steps}"
            )

    def __len__(self) -> int:
        return len(self.loader) // self.accumulation_steps

    def count(self, epoch: int) -> int:
        """Batches of ``epoch``: as many in each."""
        return len(self.loader)

    def global_batches(self, epoch: int, start: int = 0) -> Iterator[list[dict]]:
        """This rank's micro-batches of each optimizer step of ``epoch``, from position ``start``
        on."""
        if hasattr(getattr(self.loader, "sampler", None), "set_epoch"):
            self.loader.sampler.set_epoch(epoch)
        batches = islice(iter(self.loader), start, None)
        while (
            len(window := list(islice(batches, self.accumulation_steps))) == self.accumulation_steps
        ):
            yield window

    def rows_at(self, epoch: int, start: int) -> list[int]:
        """The positions of the batches, as rows are not known."""
        return list(range(start, start + self.accumulation_steps))


def as_windows(loader, accumulation_steps: int):
    """``loader`` itself when it yields windows, else :class:`DataLoaderWindows`."""
    return (
        loader
        if hasattr(loader, "global_batches")
        else DataLoaderWindows(loader, accumulation_steps)
    )


def total_steps(
    state: RunningState,
    count: Callable[[int], int],
    rows_per_step: int,
    max_epochs: int,
    max_steps: int | None = None,
) -> int:
    """Optimizer steps that a run has done when it ends, counted from where ``state`` stands.

    ``count``: epoch -> rows (or packs) of that epoch. Not epochs times steps of an epoch: a run
    resumed with larger or smaller windows has done its first steps with others.
    """
    if state.epoch >= max_epochs:
        return state.step
    left = max(count(state.epoch) - state.sample_start_index, 0) // rows_per_step
    left += sum(count(epoch) // rows_per_step for epoch in range(state.epoch + 1, max_epochs))
    return min(state.step + left, max_steps or 2**62)
