"""Sampling noise that belongs to a row, not to a batch, so that a sample does not depend on who is drawn beside it."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_ROLLOUT = 0x726F6C6C  # keeps these draws apart from those of the data order, which are seeded alike


def row_noise(seed: int, episode: int, rows: Sequence[int], steps: int) -> Tensor:
    """One number of [0, 1) for each token of each row, (len(rows), steps) fp64 on the CPU.

    ``rows``: index of each row in the global batch. A number is a function of seed, episode, row and step alone, so
    neither batch mates, the number of processes, padding nor ``steps`` changes it.
    """
    draws = [np.random.default_rng([_ROLLOUT, seed, episode, int(row)]).random(steps) for row in rows]
    return torch.from_numpy(np.stack(draws)) if draws else torch.zeros(0, steps, dtype=torch.float64)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Tokens (B,) at the quantiles ``uniform`` (B,) of ``probabilities`` (B, V); never one of probability 0.

    One number decides a token (inverse distribution function): rounding differences between two batches change it only
    where they straddle that number.
    """
    cumulative = probabilities.double().cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Rounded up to the total, a number would point behind the last token that has a probability.
    wanted = torch.minimum(uniform.to(total).unsqueeze(1) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, wanted, right=True)[:, 0]
