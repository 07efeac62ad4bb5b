"""Sampling noise by row: a sample does not depend on the batch that it is drawn in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_ROLLOUT = 0x726F6C6C  # separates these draws from those of the data order, seeded alike
BLOCK = 256  # tokens of which one number is made before single ones are looked at


@dataclass(frozen=True)
class NoiseRows:
    """The noise of a batch in a few numbers, from which a sampler elsewhere makes it itself;
    arguments as of :func:`row_noise`."""

    seed: int
    episode: int
    rows: Sequence[int]
    turn: int = 0

    def noise(self, steps: int) -> Tensor:
        """:func:`row_noise`, (len(rows), steps)."""
        return row_noise(self.seed, self.episode, self.rows, steps, self.turn)

    def select(self, rows: slice) -> "NoiseRows":
        """Of ``rows`` of the batch."""
        return replace(self, rows=self.rows[rows])


def row_noise(seed: int, episode: int, rows: Sequence[int], steps: int, turn: int = 0) -> Tensor:
    """Uniform numbers of [0, 1), (len(rows), steps) fp64 on the CPU, one a token.

    ``rows``: index of each row in the global batch; ``turn``: which of its responses it is, where a
    row has several. A number is a function of seed, episode, row, turn and step alone: batch,
    number of processes, padding and ``steps`` do not change it.
    """
    later = [turn] if turn else []  # a row's first response has the noise of rows with but one
    draws = [
        np.random.default_rng([_ROLLOUT, seed, episode, int(row), *later]).random(steps)
        for row in rows
    ]
    return (
        torch.from_numpy(np.stack(draws)) if draws else torch.zeros(0, steps, dtype=torch.float64)
    )


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Inverse transform sampling: tokens (B,) at the quantiles ``uniform`` (B,) of the
    distributions proportional to ``weights`` (B, V) >= 0; never one of weight 0.

    Rounding differences between two batches change a token only where they straddle its number.
    First the block of tokens is found, then the token in it, so that only sums of blocks and one
    block of each row are accumulated.
    """
    cumulative = blocks(weights, torch.sum, 0.0).double().cumsum(dim=-1)
    wanted = _below(uniform.to(cumulative).unsqueeze(1) * cumulative[:, -1:], cumulative[:, -1:])
    block = torch.searchsorted(cumulative, wanted, right=True)
    before = F.pad(cumulative, (1, 0)).gather(1, block)
    inside = inside_block(weights, block, 0.0).double().cumsum(dim=-1)
    wanted = _below(wanted - before, inside[:, -1:])
    return (block * BLOCK + torch.searchsorted(inside, wanted, right=True))[:, 0]


def blocks(values: Tensor, reduce: Callable[..., Tensor], empty: float) -> Tensor:
    """``reduce`` (torch.sum, torch.amax) of each :data:`BLOCK` tokens of ``values`` (B, V), the
    last block being what is left, ``empty`` where nothing is."""
    whole = values.shape[1] - values.shape[1] % BLOCK
    made = reduce(values[:, :whole].unflatten(1, (-1, BLOCK)), dim=-1)
    rest = values[:, whole:]
    last = (
        reduce(rest, dim=-1, keepdim=True)
        if rest.shape[1]
        else rest.new_full((len(rest), 1), empty)
    )
    return torch.cat([made, last], dim=1)


def inside_block(values: Tensor, block: Tensor, beyond: float) -> Tensor:
    """(B, BLOCK): of ``values`` (B, V) the block (B, 1) of each row, ``beyond`` after their end."""
    size = values.shape[1]
    index = block * BLOCK + torch.arange(BLOCK, device=values.device)
    return values.gather(1, index.clamp(max=size - 1)).masked_fill(index >= size, beyond)


def _below(numbers: Tensor, total: Tensor) -> Tensor:
    # Rounded up to the total, a number would point past the last token with a weight.
    return torch.minimum(numbers, torch.nextafter(total, torch.zeros_like(total)))
