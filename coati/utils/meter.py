"""Averages of samples: objectives report tensors, the meter divides, once per report, over all
ranks."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from coati.utils.distributed import all_gather_object, rank, world_size


@dataclass(frozen=True)
class MaskedSamples:
    """Samples of a metric, those of ``values`` (any shape) where ``mask`` (same shape, bool) is
    set.

    Selecting them would make the host wait for the device; their sum and count do not.
    """

    values: Tensor
    mask: Tensor

    def detached(self) -> "MaskedSamples":
        return MaskedSamples(self.values.detach().float().reshape(-1), self.mask.reshape(-1))

    def selected(self) -> Tensor:
        """(n,) the samples themselves."""
        return self.values[self.mask]

    def tolist(self) -> list[float]:
        return self.selected().tolist()


def detached(samples: Tensor | MaskedSamples) -> Tensor | MaskedSamples:
    """``samples`` (n,) fp32, without their graph."""
    if isinstance(samples, MaskedSamples):
        return samples.detached()
    return samples.detach().float().reshape(-1)


def selected(samples: Tensor | MaskedSamples) -> Tensor:
    """The samples themselves."""
    return samples.selected() if isinstance(samples, MaskedSamples) else samples


def sum_and_count(samples: Tensor | MaskedSamples) -> tuple[Tensor, Tensor | int]:
    """Of the samples, as fp64 tensors on their device; nothing waits for it."""
    if isinstance(samples, MaskedSamples):
        return samples.values.double().masked_fill(~samples.mask, 0.0).sum(), samples.mask.sum()
    return samples.double().sum(), samples.numel()


def to_floats(values: Iterable[Tensor | float]) -> list[float]:
    """``values`` as Python numbers, in one transfer from each device."""
    values = list(values)
    tensors = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
    found = [0.0 if i in tensors else float(value) for i, value in enumerate(values)]
    if tensors:
        moved = torch.stack([values[i].double() for i in tensors]).tolist()
        for i, value in zip(tensors, moved, strict=True):
            found[i] = value
    return found


class AccumulativeMeanMeter:
    """Sums and counts by name. Nothing is averaged before :meth:`report`, so unequal batches weigh
    rightly; sums stay on their device until then."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, Tensor | float] = {}
        self._largest: dict[str, float] = {}

    def add(
        self,
        name: str,
        values: Tensor | MaskedSamples | float,
        count_update: float | None = None,
    ) -> None:
        """Add samples: a tensor of any shape (each element is one), or a number that stands for
        ``count_update`` (1)."""
        if isinstance(values, Tensor | MaskedSamples):
            total, count = sum_and_count(values)
        else:
            count = 1.0 if count_update is None else float(count_update)
            total = float(values) * count
        self._add(name, total, count)

    def _add(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + total
        self._counts[name] = self._counts.get(name, 0.0) + count

    def add_ratio(self, name: str, total: Tensor | float, count: float) -> None:
        """Add to a sum and to what the report divides it by, seconds say."""
        self._add(name, total, count)

    def add_largest(self, name: str, value: float) -> None:
        """A value of which the report gives the largest of all ranks; no checkpoint keeps it."""
        self._largest[name] = max(value, self._largest.get(name, value))

    def add_all(self, metrics: Mapping[str, Iterable[Tensor | MaskedSamples]]) -> None:
        """Add every element of every name."""
        for name, samples in metrics.items():
            for values in samples:
                self.add(name, values)

    def get(self, name: str) -> float:
        """This rank's mean; 0 for a name without samples."""
        count = float(self._counts.get(name, 0.0))
        return float(self._sums[name]) / count if count else 0.0

    def _on_host(self) -> dict[str, list[float]]:
        sums = to_floats(self._sums.values())
        counts = to_floats(self._counts.values())
        return {
            name: [total, count]
            for name, total, count in zip(self._sums, sums, counts, strict=True)
        }

    def report(self) -> dict[str, float]:
        """Means over all ranks, of the names that have a sample on any, and the largest of what
        :meth:`add_largest` was given. One exchange; then :meth:`reset`."""
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        largest: dict[str, float] = {}
        for state, values in all_gather_object((self._on_host(), self._largest)):
            for name, (total, count) in state.items():
                sums[name] = sums.get(name, 0.0) + total
                counts[name] = counts.get(name, 0.0) + count
            for name, value in values.items():
                largest[name] = max(value, largest.get(name, value))
        self.reset()
        return {name: sums[name] / count for name, count in counts.items() if count} | largest

    def state_of_ranks(self) -> list[dict[str, list[float]]]:
        """What is not reported yet, ``{name: [sum, count]}`` of every rank, as JSON, which keeps
        floats exactly. Every rank must call it."""
        return all_gather_object(self._on_host())

    def load(self, states: list[dict[str, list[float]]]) -> None:
        """Restore what :meth:`state_of_ranks` gave. With the same number of ranks the next report
        is bitwise the same; with fewer, the states are distributed over them and it is the same up
        to rounding."""
        self.reset()
        for state in states[rank() :: world_size()]:
            for name, (total, count) in state.items():
                self._add(name, total, count)

    def reset(self) -> None:
        self._sums.clear()
        self._counts.clear()
        self._largest = {}
