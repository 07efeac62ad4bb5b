"""The interval that bench_before.py prints, against the binomial by hand."""

from benchmarks.bench_before import commands, interval_of_median


def test_ten_values_leave_out_one_at_each_end():
    """1 - 2 x (1 + 10) / 1024 = 0.979 for the 2nd and 9th, 0.891 for the 3rd and 8th."""
    assert interval_of_median([3, 1, 2, 10, 9, 8, 7, 6, 5, 4]) == (2, 9)


def test_too_few_values_give_their_range():
    """Of five, even the range covers the median with 0.9375 alone."""
    assert interval_of_median([5.0, 1.0, 3.0, 2.0, 4.0]) == (1.0, 5.0)


def test_twenty_values():
    """1 - 2 x (1 + 20 + 190 + 1140 + 4845) / 2^20 = 0.988 at the 6th, 0.959 from the 6th on: the
    6th and 15th."""
    assert interval_of_median(list(range(1, 21))) == (6, 15)


def test_a_worker_names_its_script():
    assert commands("rollout", 3)[1:4] == ["benchmarks/rollout_ways.py", "coati", "3"]
