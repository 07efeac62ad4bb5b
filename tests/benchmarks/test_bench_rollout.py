"""What the rollout benchmark counts, and that both ways are given the same."""

import pytest

from benchmarks.bench_rollout import figures
from benchmarks.rollout_ways import MODES, STOP_SHARE, prompts

CASE = {"batch_size": 4, "prompt_tokens": [2, 9], "max_new_tokens": 16}


def step(tokens: int, seconds: float, answers: list[list[int]]) -> dict:
    lengths = [len(answer) for answer in answers]
    return {
        "tokens": tokens,
        "seconds": seconds,
        "processor_seconds": seconds / 2,
        "lengths": lengths,
        "answers": answers,
    }


def test_greedy_and_sampled_batches_are_counted_apart_and_the_first_not_at_all():
    one, other = [[1], [2, 3]], [[1], [2, 4]]
    ours = [
        step(9, 9, one),
        step(9, 9, one),
        step(30, 1, one),
        step(40, 4, one),
        step(10, 1, other),
        step(9, 1, one),
    ]
    theirs = [
        step(9, 1, one),
        step(9, 1, one),
        step(10, 1, one),
        step(9, 3, one),
        step(10, 1, one),
        step(9, 3, one),
    ]
    results = {"coati": {"steps": ours}, "transformers": {"steps": theirs}}
    greedy, sampled = (figures(results, mode) for mode in MODES)
    assert (
        greedy["tokens_per_second"] == {"coati": 20.0, "transformers": 10.0}
        and greedy["ratio"] == 2.0
    )
    assert greedy["ratios_of_batches"] == [3.0, 1.0] and greedy["same_answers"] == pytest.approx(
        5 / 6
    )
    assert sampled["tokens_per_second"]["coati"] == 49 / 5
    assert sampled["ratio_of_processor_time"] == pytest.approx(49 / 5 / 3)
    assert greedy["answer_tokens"] == {"shortest": 1, "median": 1.5, "longest": 2}


def test_a_greedy_batch_and_the_sampled_one_after_it_have_the_same_prompts_and_stop_tokens():
    assert prompts(0, CASE, 480) == prompts(1, CASE, 480) != prompts(2, CASE, 480)
    rows, stops, limits = prompts(0, CASE, 480)
    assert len(rows) == 4 and all(2 <= len(row) <= 9 for row in rows)
    assert len(set(stops)) == 480 // STOP_SHARE and limits == [16] * 4


def test_more_prompts_than_rows_have_limits_of_their_own_and_equal_rows_nothing_that_stops_them():
    rows, _, limits = prompts(0, CASE | {"prompts": 40}, 480)
    assert len(rows) == len(limits) == 40 and min(limits) >= 4 and max(limits) <= 16
    assert len(set(limits)) > 5
    rows, stops, limits = prompts(0, CASE | {"equal": True}, 480)
    assert {len(row) for row in rows} == {9} and stops == [] and limits == [16] * 4
