"""pass@k, best of k, bootstrap and exact tests: against enumeration and values worked by hand."""

import math
from itertools import combinations, product
from statistics import fmean

import pytest

from coati.utils.statistics import best_of_k, bootstrap_interval, pass_at_k, sign_test


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_all_draws_that_hold_a_right_response(n):
    for right, k in product(range(n + 1), range(1, n + 1)):
        rows = [True] * right + [False] * (n - right)
        share = fmean(float(any(draw)) for draw in combinations(rows, k))
        assert pass_at_k(n, right, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_k_by_hand():
    assert pass_at_k(4, 1, 2) == 0.5  # 1 - C(3,2) / C(4,2) = 1 - 3/6
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert pass_at_k(200, 1, 100) == 0.5  # no overflow, no rounding to 0 or 1
    for wrong in ((3, 1, 4), (3, 1, 0), (3, 4, 1), (3, -1, 1)):
        with pytest.raises(ValueError, match="expected|right responses"):
            pass_at_k(*wrong)


def test_best_of_k_is_the_mean_of_the_best_of_all_draws():
    scores = [0.5, -2.0, 3.0, 3.0, 1.25, 0.0]
    for k in range(1, 7):
        mean = fmean(max(draw) for draw in combinations(scores, k))
        assert best_of_k(scores, k) == pytest.approx(mean, abs=1e-12)
    assert best_of_k([1.0, 2.0, 6.0], 2) == pytest.approx((2 + 6 + 6) / 3)
    with pytest.raises(ValueError, match="k is 4"):
        best_of_k([1.0, 2.0, 6.0], 4)


def test_pass_at_k_is_the_best_of_k_of_zeros_and_ones():
    for right, k in product(range(6), range(1, 6)):
        rows = [1.0] * right + [0.0] * (5 - right)
        assert best_of_k(rows, k) == pytest.approx(pass_at_k(5, right, k))


def test_the_exact_test_by_hand():
    # b = 1, c = 6: 2 (C(7,0) + C(7,1)) / 2^7 = 16 / 128
    assert sign_test(6, 1) == sign_test(1, 6) == 0.125
    assert sign_test(5, 0) == 2 / 32
    assert sign_test(10, 2) == pytest.approx(2 * (1 + 12 + 66) / 4096)
    assert sign_test(3, 3) == sign_test(0, 0) == 1.0  # the two tails overlap
    assert sign_test(1200, 1000) == pytest.approx(2.2e-5, rel=0.1)  # beyond floats' 2^1023


def test_a_bootstrap_of_two_values_has_the_quantiles_of_the_binomial():
    # The mean of 100 draws of 0 and 1 at even chances: 0.5 +- 1.96 * 0.05
    low, high = bootstrap_interval([0.0, 1.0] * 50)
    assert low == pytest.approx(0.4, abs=0.015) and high == pytest.approx(0.6, abs=0.015)
    assert bootstrap_interval([3.0] * 5) == (3.0, 3.0)
    assert bootstrap_interval([3.0]) == (-math.inf, math.inf)
    assert bootstrap_interval([1.0, 2.0, 4.0], seed=1) == bootstrap_interval(
        [1.0, 2.0, 4.0], seed=1
    )


def test_a_weighted_bootstrap_draws_values_with_their_weights():
    # One value has all the weight: where it is drawn at all the mean is its own.
    low, high = bootstrap_interval([0.0, 10.0] * 20, weights=[1e-12, 1.0] * 20)
    assert low == pytest.approx(10.0) == high
    even = bootstrap_interval([0.0, 1.0] * 50, weights=[2.0] * 100)
    assert even == pytest.approx(bootstrap_interval([0.0, 1.0] * 50))
