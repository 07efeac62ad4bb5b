"""How sure a measured share or correlation is."""

import math


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
