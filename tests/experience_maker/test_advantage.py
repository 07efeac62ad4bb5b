"""Rewards of actions, advantages, whitening and groups: hand-worked values, and what must not
change them."""

import math

import pytest
import torch
from torch.testing import assert_close

from coati.experience_maker.advantage import (
    broadcast_to_tokens,
    drop_rows,
    equal_groups,
    gae,
    group_advantages,
    kl_of_responses,
    last_action,
    overlong_penalty,
    penalize_missing_eos,
    rewards_to_go,
    scores_less_kl,
    token_rewards,
    whiten,
)
from coati.experience_maker.advantage_registry import GROUP_METHODS
from coati.models.policy_registry import LOSS_AGG_MODES
from tests.ranks import on_ranks

NAN = math.nan
MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])


def row(*values: float) -> torch.Tensor:
    return torch.tensor([[float(value) for value in values]])


def test_the_score_stands_at_the_last_action_and_nowhere_else():
    kl = torch.tensor([[1.0, 2.0, -1.0], [4.0, NAN, NAN], [NAN] * 3])
    scores = torch.tensor([3.0, -9.0, 7.0])
    expected = torch.tensor([[-0.1, -0.2, 0.1 + 3.0], [-0.4 - 5.0, 0, 0], [0, 0, 0]])
    assert_close(token_rewards(kl, scores, MASK, kl_coef=0.1), expected)
    unclipped = token_rewards(kl, scores, MASK, kl_coef=0.1, clip=None)
    assert_close(unclipped[1, 0].item(), -9.4)


def test_every_token_is_the_older_reward():
    kl, scores = torch.zeros(3, 3), torch.tensor([2.0, 6.0, 1.0])
    rewards = token_rewards(kl, scores, MASK, 0.1, at="every_token")
    assert rewards.tolist() == [[2, 2, 2], [5, 0, 0], [0, 0, 0]]
    with pytest.raises(ValueError, match="'end'; there are last, every_token"):
        token_rewards(kl, scores, MASK, 0.1, at="end")


def test_a_longer_response_does_not_earn_more():
    mask = torch.tensor([[1] * 8, [1] * 2 + [0] * 6])
    rewards = token_rewards(torch.zeros(2, 8), torch.ones(2), mask, 0.1)
    assert rewards.sum(1).tolist() == [1, 1]
    assert rewards_to_go(rewards, mask)[:, 0].tolist() == [1, 1]


def test_last_action():
    assert last_action(MASK).tolist() == [[False, False, True], [True, False, False], [False] * 3]


def test_gae_by_hand():
    advantages, returns = gae(row(0, 0, 5), row(1, 2, 3), torch.ones(1, 3), gamma=1.0, lam=0.0)
    assert advantages.tolist() == [[1, 1, 2]] and returns.tolist() == [[2, 3, 5]]
    _, returns = gae(row(0, 0, 0, 1), row(0, 0, 0, 1), torch.ones(1, 4), gamma=0.9, lam=0.95)
    assert_close(returns, row(0.9**3 * 0.95**2, 0.9**2 * 0.95, 0.9, 1))


def test_gae_with_lambda_1_is_the_return_less_the_value():
    torch.manual_seed(0)
    rewards, values = torch.randn(4, 6), torch.randn(4, 6)
    mask = torch.arange(6) < torch.tensor([6, 4, 1, 0])[:, None]
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=1.0)
    expected = rewards_to_go(rewards, mask, gamma=0.9)
    assert_close(returns[mask], expected[mask])
    assert_close(advantages[mask], (expected - values)[mask])


def test_nothing_comes_after_the_last_action():
    """A row alone, in a wider batch, and with NaN behind its end: the same advantages."""
    rewards, values = row(0.5, -1, 2), row(1, 0.3, -0.7)
    alone = gae(rewards, values, torch.ones(1, 3))
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    padded = [torch.nn.functional.pad(tensor, (0, 2), value=NAN) for tensor in (rewards, values)]
    for found, expected in zip(gae(*padded, mask), alone, strict=True):
        assert_close(found, torch.nn.functional.pad(expected, (0, 2)))
    assert gae(torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(2, 0))[0].shape == (2, 0)


def test_whitening_by_hand():
    # 1 2 3 6: mean 3, unbiased variance (4 + 1 + 0 + 9) / 3
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    values = torch.tensor([[1.0, 2.0, 3.0, NAN], [6.0, NAN, NAN, NAN]])
    std = math.sqrt(14 / 3)
    assert_close(
        whiten(values, mask), torch.tensor([[-2 / std, -1 / std, 0, 0], [3 / std, 0, 0, 0]])
    )


@pytest.mark.parametrize("count", [0, 1])
def test_whitening_of_too_few_actions_is_0(count):
    mask = torch.arange(3)[None] < count
    assert whiten(row(5, NAN, NAN), mask).tolist() == [[0, 0, 0]]


def test_whitening_over_ranks_is_that_of_all_rows_together():
    torch.manual_seed(1)
    values = torch.randn(6, 5) * 3 + 100
    mask = torch.arange(5) < torch.tensor([5, 1, 0, 3, 5, 2])[:, None]
    whole = whiten(values, mask)
    for cut in (1, 3, 6):
        parts = [(values[:cut], mask[:cut]), (values[cut:], mask[cut:])]
        assert_close(
            torch.cat(on_ranks(lambda part, reduce_sum: whiten(*part, reduce_sum), parts)), whole
        )
    moved = torch.tensor([3, 0, 5, 1, 4, 2])
    assert_close(whiten(values[moved], mask[moved]), whole[moved])


# Scores


def test_penalties_of_scores():
    scores, stopped = torch.tensor([1.0, 2.0]), torch.tensor([True, False])
    assert penalize_missing_eos(scores, stopped, 1.5).tolist() == [1.0, 0.5]
    lengths = torch.tensor([5, 6, 7, 8, 10, 11, 99])
    assert_close(
        overlong_penalty(lengths, 10, 4), torch.tensor([0, 0, -0.25, -0.5, -1.0, -1.0, -1.0])
    )
    for margin in (0, 11):
        with pytest.raises(ValueError, match=f"between 1 and 10 tokens, not {margin}"):
            overlong_penalty(lengths, 10, margin)


def test_kl_of_a_response_is_the_sum_over_its_actions():
    kl = torch.tensor([[0.5, 0.25, 0.25], [2.0, NAN, NAN], [NAN] * 3])
    assert kl_of_responses(kl, MASK).tolist() == [1.0, 2.0, 0.0]
    assert scores_less_kl(torch.ones(3), kl, MASK, 0.5).tolist() == [0.5, 0.0, 1.0]


# Groups

SCORES = torch.tensor([1.0, 3.0, 5.0, 2.0, 2.0, 2.0])


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("grpo", [-2 / 2.0001, 0, 2 / 2.0001, 0, 0, 0]),  # mean 3, unbiased std 2
        ("dapo", [-2 / 2.0001, 0, 2 / 2.0001, 0, 0, 0]),
        ("dr_grpo", [-2, 0, 2, 0, 0, 0]),
        ("reinforce_pp_baseline", [-2, 0, 2, 0, 0, 0]),
        ("rloo", [1 - 4, 3 - 3, 5 - 2, 0, 0, 0]),  # less the mean of the other two
        ("reinforce_pp", [1, 3, 5, 2, 2, 2]),
    ],
)
def test_group_advantages(method, expected):
    assert_close(
        group_advantages(SCORES, 3, method), torch.tensor([float(value) for value in expected])
    )


def test_every_method_has_its_values_here_and_a_loss_agg_mode_that_exists():
    tested = {
        mark.args[1][i][0]
        for mark in test_group_advantages.pytestmark
        for i in range(len(mark.args[1]))
    }
    assert tested == GROUP_METHODS.keys()
    assert {method.loss_agg_mode for method in GROUP_METHODS.values()} <= LOSS_AGG_MODES.keys()


@pytest.mark.parametrize("method", GROUP_METHODS)
def test_groups_know_nothing_of_each_other(method):
    torch.manual_seed(0)
    scores = torch.randn(12)
    whole = group_advantages(scores, 4, method)
    assert_close(torch.cat([group_advantages(part, 4, method) for part in scores.split(4)]), whole)
    inside = torch.tensor([2, 0, 3, 1])
    assert_close(group_advantages(scores[:4][inside], 4, method), whole[:4][inside])


@pytest.mark.parametrize("method", sorted(name for name, row in GROUP_METHODS.items() if row.group))
def test_equal_scores_give_exactly_nothing(method):
    assert group_advantages(torch.full((3,), 0.1), 3, method).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=f"{method} compares .*--num_generations 1"):
        group_advantages(SCORES, 1, method)


def test_reinforce_pp_needs_no_group():
    assert_close(group_advantages(SCORES, 1, "reinforce_pp"), SCORES)


def test_groups_must_be_whole():
    with pytest.raises(ValueError, match="6 responses are not a whole number of groups of 4"):
        group_advantages(SCORES, 4)
    with pytest.raises(ValueError, match="'gpro'; there are grpo"):
        group_advantages(SCORES, 3, "gpro")


def test_equal_groups_are_dropped_and_counted():
    dropped = equal_groups(SCORES, 3)
    assert dropped.tolist() == [False] * 3 + [True] * 3
    mask, count = drop_rows(torch.ones(6, 2), dropped)
    assert count == 3 and mask.tolist() == [[True] * 2] * 3 + [[False] * 2] * 3
    assert drop_rows(torch.ones(6, 2), torch.zeros(6, dtype=torch.bool))[1] == 0


def test_a_response_has_its_advantage_at_each_action():
    assert broadcast_to_tokens(torch.tensor([2.0, -1.0, NAN]), MASK).tolist() == [
        [2, 2, 2],
        [-1, 0, 0],
        [0, 0, 0],
    ]


def test_a_hole_takes_no_step_of_time():
    """Two actions, two tokens of others, one action: by hand with gamma 0.5 and lambda 0.5."""
    mask = torch.tensor([[1, 1, 0, 0, 1, 0]]).bool()
    rewards = torch.tensor([[0.0, 1.0, 9.0, 9.0, 2.0, 9.0]])
    values = torch.tensor([[1.0, 2.0, 7.0, 7.0, 4.0, 7.0]])
    advantages, returns = gae(rewards, values, mask, 0.5, 0.5)
    # A_4 = 2 - 4;  A_1 = 1 + 0.5 4 - 2 + 0.25 A_4;  A_0 = 0 + 0.5 2 - 1 + 0.25 A_1
    expected = torch.tensor([[0.125, 0.5, 0.0, 0.0, -2.0, 0.0]])
    expected[0, 1] = 1.0 + 0.25 * -2.0
    expected[0, 0] = 0.0 + 0.25 * float(expected[0, 1])
    assert_close(advantages, expected)
    assert_close(returns, (expected + values) * mask)


@pytest.mark.parametrize("holes", [(), (0,), (2,), (1, 4), (5,)])
def test_holes_change_nothing_of_what_is_left(holes):
    """Squeezed out, or with anything in them, the actions have the same advantages."""
    random = torch.Generator().manual_seed(len(holes))
    rewards = torch.rand(3, 6, generator=random)
    values = torch.rand(3, 6, generator=random)
    mask = torch.ones(3, 6).bool()
    mask[:, list(holes)] = False
    left = [t for t in range(6) if t not in holes]
    found = gae(rewards.masked_fill(~mask, 5.0), values.masked_fill(~mask, torch.nan), mask)
    alone = gae(rewards[:, left], values[:, left], mask[:, left])
    for with_holes, without in zip(found, alone, strict=True):
        assert torch.equal(with_holes[:, left], without)
        assert not with_holes[~mask].any()
