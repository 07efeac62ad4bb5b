import math

import pytest

from coati.utils.statistics import correlation, wilson_interval


def test_wilson_interval_by_hand():
    """8 of 10: center (.8 + 1.92/10) / 1.384 and half-width 1.96/1.384 x sqrt(.016 + .0096)."""
    low, high = wilson_interval(8, 10)
    assert low == pytest.approx(0.4902, abs=1e-4) and high == pytest.approx(0.9433, abs=1e-4)


def test_wilson_interval_at_the_ends_and_without_observations():
    assert wilson_interval(0, 20)[0] == 0.0 and wilson_interval(0, 20)[1] == pytest.approx(
        0.1611, abs=1e-4
    )
    assert wilson_interval(20, 20)[1] == 1.0
    assert wilson_interval(0, 0) == (0.0, 1.0)


def sums(x: list[float], y: list[float]) -> tuple[float, ...]:
    pairs = list(zip(x, y, strict=True))
    return (
        len(x),
        sum(x),
        sum(y),
        sum(a * a for a in x),
        sum(b * b for b in y),
        sum(a * b for a, b in pairs),
    )


def test_correlation_by_hand():
    assert correlation(*sums([1, 2, 3], [2, 4, 6])) == pytest.approx(1)
    assert correlation(*sums([1, 2, 3], [6, 4, 2])) == pytest.approx(-1)
    assert correlation(*sums([1, 2, 3], [1, 3, 2])) == pytest.approx(0.5)


def test_correlation_with_a_constant_is_zero_not_nan():
    found = correlation(*sums([1, 2, 3], [5, 5, 5]))
    assert found == 0 and not math.isnan(found)
    assert correlation(*sums([1], [2])) == 0
