"""Scores of a reward model, of functions, of both; what is refused."""

import pytest
import torch

from coati.experience_maker.scoring import REWARD_MODEL, Scorer
from coati.rewards.responses import Responses
from coati.rewards.scorer import Rewards
from tests.experience_maker.stubs import StubEngine
from tests.experience_maker.test_experience import experience

RESPONSES = Responses(["p"] * 3, ["a", "b", "c"], lengths=[2, 4, 1], max_new_tokens=4)
LENGTHS = StubEngine(lambda batch: batch["attention_mask"].sum(1).float())  # 5, 4, 3


def test_model_and_functions_add_up():
    total, parts = Scorer(LENGTHS, Rewards(["length"], [-2.0]))(experience(), RESPONSES)
    assert total.tolist() == [5 + 1, 4 + 2, 3 + 0.5]
    assert parts["length"].tolist() == [-0.5, -1.0, -0.25] and parts[REWARD_MODEL].tolist() == [
        5,
        4,
        3,
    ]
    assert Scorer(LENGTHS)(experience(), RESPONSES)[0].tolist() == [5, 4, 3]
    assert Scorer(None, Rewards(["length"]))(experience(), RESPONSES)[0].tolist() == [
        -0.5,
        -1.0,
        -0.25,
    ]


def test_what_gives_no_reward():
    with pytest.raises(ValueError, match="nothing gives a reward: name a reward model"):
        Scorer()
    broken = StubEngine(lambda batch: torch.tensor([1.0, float("inf"), 2.0]))
    with pytest.raises(
        ValueError, match=r"the reward model's score of response 1 is inf: prompt 'p', response 'b'"
    ):
        Scorer(broken)(experience(), RESPONSES)
