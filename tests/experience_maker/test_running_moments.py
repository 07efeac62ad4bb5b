"""The running normalization: values, ranks, saved state."""

import json

import pytest
import torch
from torch.testing import assert_close

from coati.experience_maker.running_moments import RunningNormalization
from tests.ranks import on_ranks


def test_scores_are_normalized_by_all_that_were_seen():
    running = RunningNormalization()
    running.update(torch.tensor([1.0, 2.0]))
    running.update(torch.tensor([3.0, 6.0]))
    assert (running.count, running.mean) == (4, 3) and running.std == pytest.approx((14 / 3) ** 0.5)
    assert_close(running(torch.tensor([3.0, 6.0])), torch.tensor([0, 3 / (14 / 3) ** 0.5]))


def test_large_scores_lose_no_spread():
    running = RunningNormalization()
    for part in ([1e8, 1e8 + 1], [1e8 + 2, 1e8 + 5]):
        running.update(torch.tensor(part, dtype=torch.float64))
    assert running.std == pytest.approx((14 / 3) ** 0.5)


@pytest.mark.parametrize("scores", [[], [4.0], [4.0, 4.0]])
def test_without_spread_nothing_is_divided(scores):
    running = RunningNormalization()
    running.update(torch.tensor(scores))
    assert running.std == 1 and running(torch.tensor([4.0])).tolist() == [0.0 if scores else 4.0]


def test_ranks_know_the_scores_of_all():
    def updated(scores, reduce_sum):
        running = RunningNormalization()
        running.update(torch.tensor(scores), reduce_sum)
        return running.count, running.mean, running.squares

    assert on_ranks(updated, [[1.0, 2.0, 3.0], [6.0], []]) == [(4, 3, 14)] * 3


def test_the_normalization_resumes():
    one, other = RunningNormalization(), RunningNormalization()
    one.update(torch.tensor([0.1, 0.7, -2.0]))
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for running in (one, other):
        running.update(torch.tensor([5.0, 1.0]))
    assert one.state_dict() == other.state_dict()
