"""How sure a measured share, mean, difference or correlation is."""

import math
from collections.abc import Sequence

import numpy as np

DRAWS = 10_000  # of a bootstrap


def wilson_interval(successes: float, count: float, z: float = 1.96) -> tuple[float, float]:
    """The interval in which the true share lies with 95% confidence (Wilson 1927); (0, 1) without
    observations."""
    if count <= 0:
        return 0.0, 1.0
    share = successes / count
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = (
        z
        / (1 + z * z / count)
        * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    )
    return max(0.0, center - half), min(1.0, center + half)


def correlation(count: float, x: float, y: float, xx: float, yy: float, xy: float) -> float:
    """Pearson's correlation from sums over ``count`` pairs: of x, y, their squares and products; 0
    if one is constant."""
    spread_x = count * xx - x * x
    spread_y = count * yy - y * y
    if count < 2 or spread_x <= 1e-12 * count * xx or spread_y <= 1e-12 * count * yy:
        return 0.0
    return (count * xy - x * y) / math.sqrt(spread_x * spread_y)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that of ``k`` of ``samples`` responses, drawn without replacement, one is among
    the ``right`` ones: ``1 - C(n - c, k) / C(n, k)``, unbiased (arXiv 2107.03374).

    Raises ValueError for more than there are.
    """
    _check_draw(samples, k)
    if not 0 <= right <= samples:
        raise ValueError(f"{right} right responses of {samples}")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def best_of_k(scores: Sequence[float], k: int) -> float:
    """The mean, over all draws of ``k`` of ``scores`` without replacement, of the best of them: the
    i-th smallest is the best of ``C(i - 1, k - 1)`` draws. ``k`` 1: the mean.

    Raises ValueError for more than there are.
    """
    _check_draw(len(scores), k)
    draws = math.comb(len(scores), k)
    ordered = enumerate(sorted(scores))
    return math.fsum(score * (math.comb(below, k - 1) / draws) for below, score in ordered)


def _check_draw(samples: int, k: int) -> None:
    if not 1 <= k <= samples:
        raise ValueError(f"k is {k}; expected 1 to {samples}, the responses to a prompt")


def bootstrap_interval(
    values: Sequence[float],
    seed: int = 0,
    draws: int = DRAWS,
    weights: Sequence[float] | None = None,
) -> tuple[float, float]:
    """The interval in which the mean of what ``values`` are drawn from lies with 95% confidence:
    percentiles of the means of ``draws`` samples with replacement (Efron 1979). ``weights``: the
    mean is weighted, each value drawn with its own. (-inf, inf) for fewer than two values."""
    if len(values) < 2:
        return -math.inf, math.inf
    found = np.asarray(values, dtype=np.float64)
    weighing = np.ones_like(found) if weights is None else np.asarray(weights, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = np.empty(draws)
    each = max(1, 2**22 // len(found))  # draws at a time, within 32 MiB
    for start in range(0, draws, each):
        count = min(each, draws - start)
        drawn = generator.integers(0, len(found), (count, len(found)))
        total = (found * weighing)[drawn].sum(axis=1)
        means[start : start + count] = total / weighing[drawn].sum(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def sign_test(more: int, fewer: int) -> float:
    """The two-sided p-value of ``more`` positive and ``fewer`` negative differences where either is
    as likely, exact: twice the smaller tail of Binomial(more + fewer, 1/2), at most 1. Ties are
    left out beforehand.

    Of right and wrong answers to the same questions, counted where the two models differ, it is
    McNemar's exact test.
    """
    count = more + fewer
    tail = sum(math.comb(count, number) for number in range(min(more, fewer) + 1))
    return min(1.0, 2 * tail / 2**count)
