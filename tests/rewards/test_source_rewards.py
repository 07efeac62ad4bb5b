"""Rewards by the source of a row: how they are named, which rows each scores, and their sums."""

import math

import pytest
from torch import tensor

from coati.experience_maker.rollout_batch import without_unscored
from coati.rewards.responses import Responses
from coati.rewards.scorer import Rewards
from coati.rewards.source_rewards import SourceRewards
from coati.rewards.source_sets import RewardSet, parse_source_rewards


def batch(sources):
    count = len(sources)
    return Responses(
        [f"p{row}" for row in range(count)],
        ["4"] * count,
        ["4"] * count,
        lengths=[1, 2, 3, 4][:count],
        max_new_tokens=4,
        sources=sources,
    )


def test_a_source_has_functions_and_weights(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("def good(responses): return [1.0] * len(responses)\n")
    words = ["math=gsm8k_reward_fn,length@-0.5", f"a b={mine}:good@2", "*=http://host:9/score"]
    assert parse_source_rewards(words) == {
        "math": RewardSet(["gsm8k", "length"], [1.0, -0.5]),
        "a b": RewardSet([f"{mine}:good"], [2.0]),
        "*": RewardSet(["http://host:9/score"], [1.0]),
    }


@pytest.mark.parametrize(
    "words, said",
    [
        (["math"], "--source_rewards math: expected SOURCE=NAME"),
        (["=gsm8k"], "expected SOURCE=NAME"),
        (["math="], "expected SOURCE=NAME"),
        (["math=gsm8k", "math=length"], "math is named twice; separate its functions by commas"),
        (["math=gsm9k"], "math=gsm9k: unknown reward 'gsm9k'; did you mean gsm8k"),
        (["math=gsm8k,gsm8k"], "reward gsm8k is given twice"),
        (["math=gsm8k@0"], "no function would count"),
    ],
)
def test_what_is_no_reward_of_a_source_is_refused(words, said):
    with pytest.raises(ValueError) as error:
        parse_source_rewards(words)
    assert said in str(error.value)


def test_each_row_gets_the_rewards_of_its_source():
    rewards = SourceRewards(
        {"math": Rewards(["gsm8k"]), "*": Rewards(["math_competition"], [0.5])}, Rewards(["length"])
    )
    scored = rewards(batch(["math", "law", None, "math"]))
    assert scored.total == [10 - 0.25, 5 - 0.5, 5 - 0.75, 10 - 1.0]
    assert scored.parts["length"] == [-0.25, -0.5, -0.75, -1.0]
    assert scored.parts["gsm8k"][0] == scored.parts["gsm8k"][3] == 10
    assert [math.isnan(value) for value in scored.parts["gsm8k"]] == [False, True, True, False]
    assert [math.isnan(v) for v in scored.parts["math_competition"]] == [True, False, False, True]
    counted = without_unscored("reward/gsm8k", tensor(scored.parts["gsm8k"]))
    assert counted.tolist() == [10, 10]
    assert without_unscored("reward", tensor([1.0, math.nan])).isnan().any()


def test_a_row_of_no_known_source_ends_the_run():
    with pytest.raises(ValueError, match="no reward is named for the source 'law' of a row"):
        SourceRewards({"math": Rewards(["gsm8k"])})(batch(["math", "law"]))


def test_the_same_function_everywhere_and_for_a_source_would_count_twice():
    with pytest.raises(ValueError, match="reward length is among --reward_functions"):
        SourceRewards({"math": Rewards(["length"])}, Rewards(["length"]))


def test_which_rows_need_a_ground_truth():
    rewards = SourceRewards({"math": Rewards(["gsm8k"]), "chat": Rewards(["length"])})
    found = [rewards.needs_gt_answer_of(source) for source in ("math", "chat", None)]
    assert found == [True, False, False] and not rewards.needs_gt_answer


def test_a_failing_function_shows_the_prompt_that_it_fails_on(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("def bad(responses): return [float('nan')] * len(responses)\n")
    rewards = SourceRewards({"math": Rewards([f"{bad}:bad"]), "*": Rewards(["length"])})
    with pytest.raises(
        ValueError, match="reward bad returned nan .* response 1 of the batch: prompt 'p1'"
    ):
        rewards(batch(["law", "math"]))


def test_a_function_that_fails_on_one_response_alone_names_its_place_in_the_whole_batch(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("def bad(prompts): return [1 / (prompt != 'p3') for prompt in prompts]\n")
    rewards = SourceRewards({"math": Rewards([f"{bad}:bad"]), "*": Rewards(["length"])})
    with pytest.raises(ValueError, match="response 3 of the batch: prompt 'p3'"):
        rewards(batch(["law", "math", "law", "math"]))
