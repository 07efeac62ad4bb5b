"""Averages of samples: hooks report tensors, the meter divides, once per report, over all ranks."""

from collections.abc import Iterable

import torch

from coati.utils.distributed import all_gather_object, rank, world_size


class AccumulativeMeanMeter:
    """Sums and counts by name. Nothing is averaged before :meth:`report`, so unequal batches weigh
    rightly."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, float] = {}

    def add(
        self, name: str, values: torch.Tensor | float, count_update: float | None = None
    ) -> None:
        """Add samples: a tensor of any shape (each element is one), or a number that stands for
        ``count_update`` (1)."""
        if isinstance(values, torch.Tensor):
            total, count = float(values.double().sum()), float(values.numel())
        else:
            count = 1.0 if count_update is None else float(count_update)
            total = float(values) * count
        self._sums[name] = self._sums.get(name, 0.0) + total
        self._counts[name] = self._counts.get(name, 0.0) + count

    def add_all(self, metrics: dict[str, Iterable[torch.Tensor]]) -> None:
        """Add every tensor of every name."""
        for name, tensors in metrics.items():
            for values in tensors:
                self.add(name, values)

    def get(self, name: str) -> float:
        """This rank's mean; 0 for a name without samples."""
        return (
            self._sums.get(name, 0.0) / max(self._counts.get(name, 0.0), 1e-30)
            if self._counts.get(name)
            else 0.0
        )

    def report(self) -> dict[str, float]:
        """Means over all ranks, of the names that have a sample on any. One exchange; then
        :meth:`reset`."""
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        for rank_sums, rank_counts in all_gather_object((self._sums, self._counts)):
            for name, count in rank_counts.items():
                sums[name] = sums.get(name, 0.0) + rank_sums[name]
                counts[name] = counts.get(name, 0.0) + count
        self.reset()
        return {name: sums[name] / count for name, count in counts.items() if count}

    def state_of_ranks(self) -> list[dict[str, list[float]]]:
        """What is not reported yet, ``{name: [sum, count]}`` of every rank, as JSON keeps it
        exactly. Every rank must call it."""
        return all_gather_object(
            {name: [total, self._counts[name]] for name, total in self._sums.items()}
        )

    def load(self, states: list[dict[str, list[float]]]) -> None:
        """Take up what :meth:`state_of_ranks` gave: each rank its own, or, when there were more
        ranks, the first ones the others' too; a report is the same to rounding then, and to the bit
        with as many ranks."""
        self.reset()
        for state in states[rank() :: world_size()]:
            for name, (total, count) in state.items():
                self._sums[name] = self._sums.get(name, 0.0) + total
                self._counts[name] = self._counts.get(name, 0.0) + count

    def reset(self) -> None:
        self._sums.clear()
        self._counts.clear()
