"""How a measured cost grows: the exponent of a power law, and the constant, linear and quadratic
parts of it, from which follows where it is linear."""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

TOLERANCE = 0.1  # a cost is linear where its other terms are at most this share of it


class Curve(NamedTuple):
    """constant + linear x + quadratic x^2, none of them negative."""

    constant: float
    linear: float
    quadratic: float

    def at(self, x: float) -> float:
        return self.constant + self.linear * x + self.quadratic * x * x

    def linear_from(self) -> float:
        """The x from which on the constant is at most :data:`TOLERANCE` of constant and linear
        term together."""
        if not self.constant:
            return 0.0
        if not self.linear:
            return math.inf
        return self.constant / self.linear * (1 - TOLERANCE) / TOLERANCE

    def linear_to(self) -> float:
        """The x up to which the quadratic term is at most :data:`TOLERANCE` of the whole."""
        if not self.quadratic:
            return math.inf
        # quadratic x^2 = TOLERANCE (constant + linear x + quadratic x^2)
        share = TOLERANCE / (1 - TOLERANCE)
        half = share * self.linear / (2 * self.quadratic)
        return half + math.sqrt(half * half + share * self.constant / self.quadratic)


def plain(x: float) -> str:
    """Three digits, without a power of ten: 1,640."""
    return f"{float(f'{x:.3g}'):,.12g}"


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The b of y = a x^b by least squares of the logarithms; points without a positive y are left
    out, and with fewer than two there is none (nan)."""
    points = [(math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True) if x > 0 and y > 0]
    if len(points) < 2:
        return math.nan
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    above = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return above / sum((x - mean_x) ** 2 for x, _ in points)


def curve(xs: Sequence[float], ys: Sequence[float], degree: int = 2) -> Curve:
    """The best :class:`Curve` up to x^``degree`` by least squares of relative errors. No term is
    negative: of all choices of terms those with a negative one are out, and of the others the
    nearest to the points wins, which is the optimum under that condition.

    Raises ValueError for fewer than two points or a cost that is not positive.
    """
    import numpy as np

    if len(xs) < 2 or min(ys) <= 0:
        raise ValueError(f"a curve needs two points of positive cost, not {list(ys)}")
    x = np.asarray(xs, dtype=float)
    y = np.asarray(ys, dtype=float)
    # In units of the largest x, or the columns differ by many orders of magnitude.
    scale = x.max()
    columns = np.stack([(x / scale) ** power / y for power in range(degree + 1)], axis=1)
    best = np.zeros(degree + 1)
    least = math.inf
    for count in range(1, degree + 2):
        for chosen in combinations(range(degree + 1), count):
            part = columns[:, chosen]
            found = np.linalg.lstsq(part, np.ones(len(y)), rcond=None)[0]
            error = float(((part @ found - 1) ** 2).sum())
            # A further term has to earn its place: rounding alone always lowers the error.
            if (found >= 0).all() and error < least - 1e-9:
                least = error
                best = np.zeros(degree + 1)
                best[list(chosen)] = found
    terms = [float(best[power]) / scale**power for power in range(degree + 1)]
    return Curve(*terms, *[0.0] * (2 - degree))


def largest_error(xs: Sequence[float], ys: Sequence[float], fitted: Curve) -> float:
    """Between a point and the curve, relative to the point."""
    return max(abs(fitted.at(x) / y - 1) for x, y in zip(xs, ys, strict=True))
