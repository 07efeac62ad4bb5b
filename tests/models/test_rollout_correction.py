"""Importance weights of responses that older weights sampled: every number worked by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from coati.models.policy_registry import ROLLOUT_IS, ROLLOUT_IS_CAPS
from coati.models.rollout_correction import (
    RolloutCorrection,
    gap_metrics,
    gap_per_action,
    importance_ratios,
)

LOG2 = math.log(2)
# Ratios 2, 4, 1/2 and 1/4, 1, then padding that must not matter.
SAMPLED = torch.tensor([[-1.0, -3.0, -0.5], [-1.0, -2.0, float("nan")]])
POLICY = torch.tensor(
    [[-1.0 + LOG2, -3.0 + 2 * LOG2, -0.5 - LOG2], [-1.0 - 2 * LOG2, -2.0, float("inf")]]
)
MASK = torch.tensor([[True, True, True], [True, True, False]])
STALE = torch.tensor([True, True])


def weights(correction: RolloutCorrection, stale=STALE, mask=MASK) -> torch.Tensor:
    return correction.weights(POLICY, SAMPLED, mask, stale)


def test_ratios_of_tokens_and_of_responses():
    token = importance_ratios(POLICY, SAMPLED, MASK, "token")
    assert_close(token, torch.tensor([[2.0, 4.0, 0.5], [0.25, 1.0, 1.0]]))
    # 2 x 4 / 2 and 1/4 x 1 at each action of the response
    sequence = importance_ratios(POLICY, SAMPLED, MASK, "sequence")
    assert_close(sequence, torch.tensor([[4.0, 4.0, 4.0], [0.25, 0.25, 1.0]]))


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, [[2.0, 2.0, 0.5], [0.25, 1.0]]),
        ({"cap": 3.0}, [[2.0, 3.0, 0.5], [0.25, 1.0]]),
        ({"keep": (0.4, 3.0)}, [[2.0, 0.0, 0.5], [0.0, 1.0]]),
        ({"level": "sequence"}, [[3.0, 3.0, 3.0], [0.25, 0.25]]),
        ({"level": "sequence", "cap": 5.0, "keep": (0.3, 9.0)}, [[4.0, 4.0, 4.0], [0.0, 0.0]]),
        ({"level": "none"}, [[1.0, 1.0, 1.0], [1.0, 1.0]]),
    ],
)
def test_weights_are_truncated_and_masked(settings, expected):
    found = weights(RolloutCorrection(**settings))
    assert_close(found[MASK], torch.tensor([one for row in expected for one in row]))


def test_rows_of_the_weights_of_now_weigh_exactly_one():
    found = weights(RolloutCorrection(keep=(0.9, 1.1)), stale=torch.tensor([False, True]))
    assert torch.equal(found[0], torch.ones(3))
    assert_close(found[1, :2], torch.tensor([0.0, 1.0]))


def test_weights_have_no_gradient():
    policy = POLICY.clone().requires_grad_()
    assert not RolloutCorrection().weights(policy, SAMPLED, MASK, STALE).requires_grad


def test_ratios_are_bounded_however_far_the_policy_has_moved():
    far = torch.full((1, 3), -90.0), torch.zeros(1, 3)
    mask = torch.ones(1, 3, dtype=torch.bool)
    for level in ("token", "sequence"):
        assert_close(importance_ratios(*far, mask, level), torch.full((1, 3), math.exp(-20)))
        assert_close(importance_ratios(*far[::-1], mask, level), torch.full((1, 3), math.exp(20)))


def test_a_masked_action_changes_no_other():
    short = torch.tensor([[True, True, False], [True, True, False]])
    correction = RolloutCorrection("sequence", cap=100.0)
    # 2 x 4: without the third token the response's ratio is another
    assert_close(weights(correction, mask=short)[0, :2], torch.tensor([8.0, 8.0]))


def metrics(correction: RolloutCorrection, stale=STALE) -> dict[str, float]:
    return gap_metrics(correction.sums(POLICY, SAMPLED, MASK, stale))


def test_metrics_of_tokens():
    assert_close(gap_per_action(POLICY, SAMPLED, MASK).sum(), torch.tensor(6 * LOG2))
    found = metrics(RolloutCorrection(keep=(0.3, 9.0)))
    assert found["staleness_gap"] == pytest.approx(6 * LOG2 / 5, rel=1e-6)
    assert found["rollout_is_truncated"] == 1 / 5  # 4; 2 is not above the cap
    assert found["rollout_is_masked"] == 1 / 5
    # weights 2, 2, 1/2, 0, 1: (5.5)^2 / (5 x 9.25)
    assert found["rollout_is_ess"] == pytest.approx(5.5**2 / (5 * 9.25), rel=1e-6)
    assert "rollout_gap" not in found


def test_metrics_of_responses():
    found = metrics(RolloutCorrection("sequence"))
    assert found["rollout_is_truncated"] == 1 / 2 and found["rollout_is_masked"] == 0
    assert found["rollout_is_ess"] == pytest.approx(3.25**2 / (2 * 9.0625), rel=1e-6)


def test_the_gap_of_engines_and_that_of_time_are_told_apart():
    found = metrics(RolloutCorrection(), stale=torch.tensor([False, True]))
    assert found["rollout_gap"] == pytest.approx(4 * LOG2 / 3, rel=1e-6)
    assert found["staleness_gap"] == pytest.approx(LOG2, rel=1e-6)
    assert found["rollout_is_ess"] == pytest.approx(1.25**2 / (2 * 1.0625), rel=1e-6)
    fresh = metrics(RolloutCorrection(), stale=torch.tensor([False, False]))
    assert fresh == {"rollout_gap": pytest.approx(6 * LOG2 / 5, rel=1e-6)}


def test_without_weights_the_gap_is_still_measured():
    found = metrics(RolloutCorrection("none"))
    assert found == {"staleness_gap": pytest.approx(6 * LOG2 / 5, rel=1e-6)}


def test_nothing_is_left_where_everything_is_masked():
    found = metrics(RolloutCorrection(keep=(0.99, 1.01)))
    assert found["rollout_is_masked"] == 4 / 5 and found["rollout_is_ess"] == pytest.approx(1 / 5)
    gone = RolloutCorrection(keep=(0.99, 1.01)).sums(
        POLICY[:, :1], SAMPLED[:, :1], MASK[:, :1], STALE
    )
    assert gap_metrics(gone)["rollout_is_ess"] == 0.0


def test_sums_over_ranks_are_those_of_one():
    correction = RolloutCorrection("sequence", keep=(0.3, 9.0))
    whole = correction.sums(POLICY, SAMPLED, MASK, STALE)
    parts = [
        correction.sums(POLICY[i : i + 1], SAMPLED[i : i + 1], MASK[i : i + 1], STALE[i : i + 1])
        for i in range(2)
    ]
    assert_close(sum(parts), whole)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"level": "word"}, "unknown level of importance weights 'word'"),
        ({"cap": 0.5}, "a cap of 0.5 is below"),
        ({"keep": (1.5, 2.0)}, "ratios from 1.5 to 2: expected"),
        ({"keep": (-1.0, 2.0)}, "ratios from -1 to 2: expected"),
    ],
)
def test_what_is_no_correction(settings, said):
    with pytest.raises(ValueError, match=said):
        RolloutCorrection(**settings)


def test_every_level_has_a_cap():
    assert ROLLOUT_IS.keys() == ROLLOUT_IS_CAPS.keys()
