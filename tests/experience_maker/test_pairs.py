"""Pairs of responses: which are chosen, what their rows hold, and that no rank's share of an
episode decides it."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from coati.experience_buffer.pair_buffer import PairBuffer
from coati.experience_maker.experience import sample_indices
from coati.experience_maker.pairs import PairMaker, best_and_worst, pair_indices, pairs_of
from coati.experience_maker.rollout_batch import ExperienceSettings
from coati.experience_maker.scoring import Scorer
from coati.rewards.scorer import Rewards
from tests.experience_maker.stubs import StubEngine, StubRollout, Words, log_probs, prompts
from tests.experience_maker.test_experience import experience

PROMPTS = [[11, 12, 13], [11, 12, 13], [21], [21]]
ANSWERS = [[14, 15], [22, 23, 24], [33], [43, 44, 45, 46]]


@pytest.mark.parametrize(
    ("scores", "size", "best", "worst"),
    [
        ([1.0, 3.0, 2.0, 0.0], 2, [1, 2], [0, 3]),
        ([1.0, 3.0, 2.0, 0.0], 4, [1], [3]),
        ([2.0, 5.0, 5.0, 0.0, 0.0, 1.0], 3, [1, 5], [0, 3]),  # the first of several equal ones
        ([7.0, 7.0, 7.0, 1.0, 1.0, 1.0], 3, [0, 3], [0, 3]),  # ties
    ],
)
def test_the_best_and_the_worst_of_each_group(scores, size, best, worst):
    found = best_and_worst(torch.tensor(scores), size)
    assert [rows.tolist() for rows in found] == [best, worst]


def test_a_pair_takes_two():
    for scores, size in (([1.0, 2.0], 1), ([1.0, 2.0, 3.0], 2)):
        with pytest.raises(ValueError, match="two or more responses to each prompt"):
            best_and_worst(torch.tensor(scores), size)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("size", [2, 3])
def test_pairs_are_numbered_alike_for_any_number_of_ranks(ranks, size):
    """6 prompts in each of 2 steps: the indices that one response to each would have."""
    found = []
    for rank in range(ranks):
        count = 6 // ranks * size
        for step in range(2):
            index = torch.tensor(sample_indices(step, 2, rank * count, count))
            found.append((rank, step, pair_indices(index, size).tolist()))
    for rank, step, index in found:
        assert index == sample_indices(step, 2, rank * (6 // ranks), 6 // ranks)


def test_a_tie_has_rows_that_do_not_count():
    one = experience(PROMPTS, ANSWERS, left=1, right=2, junk=7.0)
    pairs, tied = pairs_of(one, torch.tensor([1.0, 4.0, 2.0, 2.0]), 2)
    assert tied.tolist() == [False, True] and pairs.sample_index.tolist() == [0, 1, 2, 3]
    assert pairs.sequences[:, pairs.prompt_width :][0].tolist()[:3] == [22, 23, 24]
    assert pairs.action_mask.sum(1).tolist() == [3, 2, 0, 0]
    assert pairs.response_lengths().tolist() == [3, 2, 1, 4]
    assert pairs.reward.tolist() == [4.0, 1.0, 2.0, 2.0]


def make(rewards, *, temperature_logprob=-0.25, reference=-1.5, count=2, **settings):
    settings = ExperienceSettings(
        max_new_tokens=3,
        stop_sequences=[[2]],
        num_generations=count,
        kl_in="loss",
        reward_clip=None,
        **settings,
    )
    scorer = Scorer(functions=Rewards(["python:given"], given={"python:given": rewards}))
    return PairMaker(
        StubEngine(log_probs(temperature_logprob)),
        StubRollout([[3, 2], [4, 4, 4], [5, 2], [6]]),
        scorer,
        Words(),
        settings,
        reference=StubEngine(log_probs(reference)),
    )


def collect(maker, temperature=1.0):
    asked = maker.ask(prompts([5, 6], [7]), range(4), 0, temperature)
    batch = maker.make_experience(asked)
    return batch, *maker.finalize_advantages([batch])


def test_a_collect_step():
    batch, (pairs,), metrics = collect(make(lambda responses: [0.0, 2.0, 3.0, 1.0]))
    assert pairs.sequences.tolist() == [
        [5, 6, 4, 4, 4],
        [5, 6, 3, 2, 9],
        [8, 7, 5, 2, 9],
        [8, 7, 6, 9, 9],
    ]
    assert pairs.action_mask.sum(1).tolist() == [3, 2, 2, 1]
    assert_close(pairs.reference_log_probs[0], torch.full((3,), -1.5))
    assert_close(pairs.action_log_probs[0], torch.full((3,), -1.0))  # of the sampler
    samples = batch.samples
    assert samples["win_margin"].tolist() == [2.0, 2.0] and samples["ties"].tolist() == [0, 0]
    assert samples["chosen_length"].tolist() == [3, 2]
    assert samples["rejected_length"].tolist() == [2, 1]
    assert samples["reward"].tolist() == [0, 2, 3, 1], "of all responses"
    assert_close(samples["approx_kl"], torch.tensor([1.0, 1.5, 1.0, 0.5]))
    # 0, 2, 3, 1: mean 1.5, squares 2.25, .25, 2.25, .25 over 3
    assert metrics == {"reward_std": pytest.approx((5 / 3) ** 0.5)}


def test_a_missing_end_costs_before_pairs_are_made():
    """The second and the last response have not ended."""
    scores = lambda responses: [0.0, 2.0, 3.0, 2.5]  # noqa: E731
    batch, (pairs,), _ = collect(make(scores, missing_eos_penalty=3.0))
    assert pairs.reward.tolist() == [0.0, -1.0, 3.0, -0.5]
    assert batch.samples["win_margin"].tolist() == [1.0, 3.5]
    batch, _, _ = collect(make(scores, missing_eos_penalty=2.0))
    assert batch.samples["ties"].tolist() == [1, 0]


def test_log_probs_are_of_temperature_1_whatever_is_sampled_at():
    maker = make(lambda responses: [0.0, 2.0, 3.0, 1.0])
    _, (pairs,), _ = collect(maker, temperature=0.5)
    assert maker.rollout.temperatures == [0.5]
    assert maker.actor.temperature == maker.reference.temperature == 1.0
    assert_close(pairs.action_log_probs[0], torch.full((3,), -0.25))  # of the actor, anew


def test_the_buffer_holds_pairs_together():
    """8 pairs of 2 steps in 4 global batches of micro-batches of one pair, and after a resume."""
    buffer = PairBuffer(1)
    for step in range(2):
        one = experience([[11], [11]] * 4, [[i + 20, i + 21] for i in range(8)])
        index = torch.tensor(sample_indices(step, 2, 0, 4))
        both = torch.stack([2 * index, 2 * index + 1], 1).flatten()
        buffer.append(replace(one, sample_index=both, advantages=None, returns=None, values=None))
    assert len(buffer) == 8
    again = PairBuffer(1)
    again.load_state_dict(buffer.state_dict())
    seen = []
    for held in (buffer, again):
        batches = list(held.global_batches(4, seed=3, episode=1))
        assert [len(batch) for batch in batches] == [2] * 4
        rows = [part.sample_index.tolist() for batch in batches for part in batch]
        assert all(first % 2 == 0 and second == first + 1 for first, second in rows)
        assert sorted(first // 2 for first, _ in rows) == list(range(8))
        seen.append(rows)
    assert seen[0] == seen[1]
