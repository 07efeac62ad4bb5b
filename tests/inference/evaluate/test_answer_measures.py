"""Right and wrong answers, majority votes, and measures that are compared row by row."""

import math
from itertools import combinations

import pytest

from coati.inference.evaluate.answer_measures import (
    answer_measures,
    majority,
    rights,
    unique_keys,
)
from coati.inference.evaluate.generate_responses import Prompt
from coati.inference.evaluate.measure_table import (
    Measure,
    comparison,
    comparisons,
    measure,
    perplexity_measure,
)
from coati.inference.evaluate.result_files import (
    PICTURE,
    RESULTS,
    TABLE,
    read_results,
    rows_of,
    rows_of_comparisons,
    write_results,
)
from coati.utils.statistics import wilson_interval

TAGS = {
    name: {"text": text, "num_occur": 1}
    for name, text in {
        "think_start": "<think>",
        "think_end": "</think>",
        "answer_start": "<answer>",
        "answer_end": "</answer>",
    }.items()
}


def prompt(number: int, gt_answer: str | None = "1") -> Prompt:
    return Prompt(f"f:{number}", number, [{"role": "user", "content": "q"}], gt_answer)


def test_a_response_is_right_as_its_answer_is_found_and_compared():
    texts = [r"so \boxed{\frac{1}{2}}", "the answer is 0.5", "12 and 0.6", "none"]
    assert rights(texts, "work #### 1/2") == [True, True, False, False]


def test_with_tags_the_answer_stands_between_them():
    whole = "<think>3</think><answer>4</answer>"
    assert rights([whole, "4", whole.replace("</answer>", "")], "4", TAGS) == [True, False, False]


def test_the_majority_of_answers_that_are_equal_though_written_otherwise():
    assert majority(["it is 1/2", r"\boxed{0.5}", "7"], "0.5") == 1.0
    assert majority(["7", "7", "0.5"], "0.5") == 0.0
    assert majority(["no", "nothing", "5"], "5") == 1.0  # who says nothing has no vote
    assert majority(["no"], "5") == 0.0


def test_of_answers_with_as_many_votes_one_is_taken_by_chance():
    assert majority(["1", "2"], "1") == 0.5
    assert majority(["1", "2", "3", "3", "1", "2"], "3") == pytest.approx(1 / 3)


def test_the_measures_of_right_responses_against_enumeration():
    right = {0: [True, False, False, False], 1: [True, True, False, True], 2: [False] * 4}
    prompts = [prompt(k) for k in right]
    found = answer_measures(prompts, {k: f"key{k}" for k in right}, right, [1, 2, 4])
    assert [one.name for one in found] == ["pass@1", "pass@2", "pass@4", "avg@4"]
    for one, k in zip(found, (1, 2, 4), strict=False):
        each = [
            sum(any(draw) for draw in combinations(row, k)) / math.comb(4, k)
            for row in right.values()
        ]
        assert list(one.rows.values()) == pytest.approx(each)
        assert one.value == pytest.approx(sum(each) / 3)
    assert found[0].value == found[3].value == pytest.approx(4 / 12)
    assert found[0].interval == "bootstrap over rows"
    assert found[2].interval == "Wilson"  # any of all four: right or wrong
    assert (found[2].low, found[2].high) == wilson_interval(2, 3)


def test_mcnemar_by_hand():
    keys = [f"k{n}" for n in range(20)]
    before = measure("pass@1", dict(zip(keys, [1.0] * 8 + [0.0] * 12, strict=True)))
    # of the 8 right ones 1 is lost, of the 12 wrong ones 6 are won
    now = measure("pass@1", dict(zip(keys, [1.0] * 7 + [0.0] + [1.0] * 6 + [0.0] * 6, strict=True)))
    found = comparison(before, now)
    assert (found.better, found.worse, found.count) == (6, 1, 20)
    assert found.p == 0.125 and found.test == "McNemar's exact test"
    assert found.difference == pytest.approx(0.25) and found.verdict == "no significant difference"
    assert found.low < 0.25 < found.high


def test_scores_are_compared_by_signs_and_only_on_rows_that_both_have():
    before = measure("score", {"a": 1.0, "b": 2.0, "c": 3.0, "x": 9.0}, unit="score")
    now = measure("score", {"a": 1.5, "b": 2.0, "c": 2.0, "y": -9.0}, unit="score")
    found = comparison(before, now)
    assert (found.count, found.better, found.worse, found.p) == (3, 1, 1, 1.0)
    assert found.test == "sign test" and found.difference == pytest.approx(-0.5 / 3)
    assert comparisons([before], [measure("other", {"a": 1.0}, unit="score")]) == []
    assert comparison(before, measure("score", {"z": 1.0}, unit="score")) is None
    assert comparison(before, measure("score", {"a": 1.0})) is None  # another unit


def test_perplexities_are_compared_by_tokens_and_lower_is_better():
    tokens = {"a": 10.0, "b": 30.0}
    before = perplexity_measure("perplexity", {"a": 2.0, "b": 1.0}, tokens)
    now = perplexity_measure("perplexity", {"a": 2.0, "b": 0.5}, tokens)
    assert before.value == pytest.approx(math.exp((20 + 30) / 40))
    found = comparison(before, now)
    assert found.difference == pytest.approx(now.value / before.value)
    assert (found.better, found.worse) == (1, 0)
    other = perplexity_measure("perplexity", {"a": 2.0, "b": 0.5}, {"a": 10.0, "b": 31.0})
    with pytest.raises(ValueError, match="other numbers of tokens"):
        comparison(before, other)


def test_of_one_row_no_bounds_are_known():
    before = perplexity_measure("perplexity", {"a": 2.0}, {"a": 10.0})
    now = perplexity_measure("perplexity", {"a": 1.0}, {"a": 10.0})
    unknown = (-math.inf, math.inf)
    assert (now.low, now.high) == unknown
    found = comparison(before, now)
    assert (found.low, found.high) == unknown and found.difference == pytest.approx(math.exp(-1))
    assert "(- to -)" in rows_of_comparisons([found])[0][3]
    assert rows_of([now])[0][2] == "- to -"


def test_seven_better_rows_of_seven_are_significant_six_and_one_are_not():
    rows = {f"{k}": 0.0 for k in range(7)}
    better = {key: 1.0 for key in rows}
    found = comparison(measure("m", rows), measure("m", better))
    assert found.p == 2 / 128 and found.verdict == "better"
    assert comparison(measure("m", better), measure("m", rows)).verdict == "worse"


def test_equal_prompts_stay_apart():
    assert unique_keys(["a", "b", "a", "a"]) == ["a", "b", "a#2", "a#3"]


def test_results_are_read_back_as_they_were_written(tmp_path):
    made = [
        measure("pass@1", {"a": 1.0, "b": 0.0}),
        measure("score", {"a": 2.5}, unit="score"),  # of one row: no interval
        perplexity_measure("perplexity", {"a": 2.0, "b": 1.0}, {"a": 3.0, "b": 4.0}),
    ]
    compared = comparisons(made, made)
    write_results(tmp_path, {"model": "m|x"}, made, compared, made)
    about, found = read_results(str(tmp_path))
    assert about["model"] == "m|x" and found == made
    assert about["compared"][0]["verdict"] == "no significant difference"
    assert read_results(str(tmp_path / RESULTS))[1] == made
    assert "| pass@1 | 0.5 |" in (tmp_path / TABLE).read_text()
    drawn = (tmp_path / PICTURE).read_text()
    for text in ("<svg", "pass@1", "perplexity", "baseline", "here"):
        assert text in drawn


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"measures": 3}', '{"measures": [{"x": 1}]}', "{"]
)
def test_a_file_of_another_kind_is_named(tmp_path, content):
    file = tmp_path / RESULTS
    file.write_text(content)
    with pytest.raises(ValueError, match=RESULTS):
        read_results(str(tmp_path))
    file.unlink()
    with pytest.raises(ValueError, match="--output_dir of another coati evaluate"):
        read_results(str(tmp_path))


def test_a_measure_that_is_no_share_has_no_wilson_interval():
    found = measure("score", {"a": 0.0, "b": 1.0, "c": 1.0}, unit="score")
    assert found.interval == "bootstrap over rows" and isinstance(found, Measure)
