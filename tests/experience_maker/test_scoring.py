"""Scores of a reward model, of functions, of both; what is refused."""

import asyncio
import threading

import pytest
import torch
from torch.testing import assert_close

from coati.experience_maker.scoring import REWARD_MODEL, Scorer
from coati.rewards.responses import Responses
from coati.rewards.scorer import Rewards
from tests.experience_maker.stubs import StubEngine, prompts
from tests.experience_maker.test_experience import experience
from tests.experience_maker.test_maker import make

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


# Judged while others still generate


class Slow:
    """A reward of one response that waits until it is let go."""

    def __init__(self):
        self.begun, self.free = threading.Event(), threading.Event()

    async def __call__(self, responses):
        self.begun.set()
        while not self.free.is_set():
            await asyncio.sleep(0.005)
        return [float(len(text)) for text in responses]


def make_grpo(scorer, **settings):
    """Responses "3" and "3 4" to the first prompt, "5" and "6" to the second."""
    answers = [[3, 2], [3, 4, 2], [5, 2], [6, 2]]
    group = {"method": "grpo", "num_generations": 2, "reward_clip": None, "kl_coef": 0.0}
    return make(answers, scorer, reference=None, **(group | settings))


def slow_scorer(slow, **options):
    return Scorer(None, Rewards(["python:slow"], given={"python:slow": slow}, **options))


def test_the_first_batch_is_judged_while_the_second_is_sampled():
    slow = Slow()
    maker = make_grpo(slow_scorer(slow))
    assert maker.scores_beside
    first = maker.begin_experience(maker.ask(prompts([5, 6]), range(2), 0))
    assert slow.begun.wait(10)  # nobody has asked for a score yet
    second = maker.begin_experience(maker.ask(prompts([7]), range(2, 4), 0))
    slow.free.set()
    found = [maker.finish_experience(batch) for batch in (first, second)]
    assert found[0].experience.reward.tolist() == [1.0, 3.0]
    assert found[1].experience.reward.tolist() == [1.0, 1.0]


def test_early_or_at_once_the_experience_is_the_same():
    """Running normalization too, whose state depends on the order of batches."""
    made = []
    for early in (True, False):
        slow = Slow()
        slow.free.set()
        maker = make_grpo(slow_scorer(slow), reward_normalization="running")
        rows = [(prompts([5, 6]), range(2), 0), (prompts([7]), range(2, 4), 0)]
        if early:
            begun = [maker.begin_experience(maker.ask(*row)) for row in rows]
            batches = [maker.finish_experience(batch) for batch in begun]
        else:
            batches = [maker.make_experience(maker.ask(*row)) for row in rows]
        made.append((batches, maker.state_dict()))
    (early_ones, state), (others, same) = made
    assert state == same
    for one, other in zip(early_ones, others, strict=True):
        assert_close(one.experience.advantages, other.experience.advantages)
        assert one.experience.reward.tolist() == other.experience.reward.tolist()
        assert one.responses == other.responses


def test_what_does_not_wait_is_not_begun_early():
    assert not Scorer(None, Rewards(["length"])).beside and not Scorer(LENGTHS).beside


def test_a_failure_is_raised_when_the_batch_is_finished():
    async def fails(responses):
        raise KeyError("nothing here")

    maker = make_grpo(slow_scorer(fails))
    batch = maker.begin_experience(maker.ask(prompts([5, 6]), range(2), 0))
    with pytest.raises(ValueError, match="reward slow raised KeyError: 'nothing here'"):
        maker.finish_experience(batch)
