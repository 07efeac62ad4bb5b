"""Losses of policy and value by hand-worked values; masks, splits and skipped micro-batches."""

import math

import pytest
import torch
from torch.testing import assert_close

from coati.models import PolicyLoss, ValueLoss
from coati.models.policy_loss import (
    LossAggregation,
    explained_variance,
    kl_per_token,
    mean_ratio_exceeds,
    policy_terms,
    ratio_sums,
    value_statistics,
    value_terms,
)
from coati.models.policy_registry import KL_ESTIMATORS, LOSS_AGG_MODES
from tests.ranks import on_ranks

NAN = math.nan
ALL = torch.ones(1, 3)


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values])


def selected(statistics) -> dict[str, torch.Tensor]:
    return {name: samples.selected() for name, samples in statistics.items()}


def test_clipped_policy_loss():
    # ratios .5 1 1.5: min(.5, .8) = .5; min(-1, -1) = -1; min(3, 1.2 x 2 = 2.4) = 2.4
    terms = policy_terms(row(0.5, 1, 1.5).log(), torch.zeros(1, 3), row(1, -1, 2), ALL)
    assert_close(terms, row(-0.5, 1.0, -2.4))
    assert_close(terms.mean().item(), -0.6333, atol=1e-4, rtol=0)


def test_clipping_is_one_sided_and_only_what_is_not_clipped_has_a_gradient():
    logps = row(0.5, 0.5, 1.5, 1.5).log().requires_grad_()
    terms = policy_terms(logps, torch.zeros(1, 4), row(1, -1, 1, -1), torch.ones(1, 4))
    # A bad action that became rarer, and a good one that became more likely, have gone far enough:
    # .8 and 1.2.
    assert_close(terms, row(-0.5, 0.8, -1.2, 1.5))
    terms.sum().backward()
    assert_close(logps.grad, row(-0.5, 0.0, 0.0, 1.5))  # d(-ratio A) / d logp = -ratio A


def test_dapo_clips_further_above_than_below():
    terms = policy_terms(
        row(0.5, 1.5).log(), torch.zeros(1, 2), row(-1, 1), torch.ones(1, 2), 0.2, 0.28
    )
    assert_close(terms, row(0.8, -1.28))


def test_on_policy_the_gradient_is_that_of_reinforce():
    logps = row(-1.0, -2.0, -0.5).requires_grad_()
    policy_terms(logps, logps.detach(), row(1, -1, 2), ALL).sum().backward()
    assert_close(logps.grad, row(-1.0, 1.0, -2.0))


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_masked_cells_change_neither_losses_nor_gradients(bad):
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    torch.manual_seed(0)
    clean = [torch.randn(2, 3) * mask for _ in range(3)]

    def losses(tensors):
        first = tensors[0].clone().requires_grad_()
        terms = (
            policy_terms(first, tensors[1], tensors[2], mask)
            + value_terms(first, tensors[1], tensors[2], mask)
            + kl_per_token(first, tensors[1], mask, "k3")
        )
        terms.sum().backward()
        return terms.detach(), first.grad

    dirty = [tensor.masked_fill(mask == 0, bad) for tensor in clean]
    assert_close(losses(dirty), losses(clean))
    assert losses(dirty)[1][mask == 0].eq(0).all()
    found, expected = (value_statistics(*tensors[:2], mask) for tensors in (dirty, clean))
    assert_close(selected(found), selected(expected))
    assert_close(explained_variance(*dirty[:2], mask), explained_variance(*clean[:2], mask))
    assert_close(ratio_sums(*dirty[:2], mask), ratio_sums(*clean[:2], mask))


def test_kl_estimators():
    logps, reference = row(-1.0, -2.0, -1.0), row(-1.5, -1.0, -1.0)  # x = .5, -1, 0
    expected = {
        "k1": row(0.5, -1, 0),
        "k2": row(0.125, 0.5, 0),
        "k3": row(math.exp(-0.5) - 1 + 0.5, math.e - 2, 0),
    }
    assert expected.keys() == KL_ESTIMATORS.keys()
    for name, values in expected.items():
        assert_close(kl_per_token(logps, reference, ALL, name), values)


def test_k1_and_k3_are_unbiased_and_k3_varies_less():
    policy, reference = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    exact = (policy * (policy / reference).log()).sum()
    every = [
        kl_per_token(policy.log()[None], reference.log()[None], ALL, name)[0]
        for name in ("k1", "k3")
    ]
    for values in every:
        assert_close((policy * values).sum(), exact)
    variance = [(policy * (values - exact).square()).sum() for values in every]
    assert variance[1] < variance[0] / 10


def test_an_unknown_estimator_is_named():
    with pytest.raises(ValueError, match="'k4'; there are k1, k2, k3"):
        kl_per_token(ALL, ALL, ALL, "k4")


def test_skipping_is_decided_by_the_mean_ratio_of_all_ranks():
    mask = torch.tensor([[1, 1, 0]])
    far = ratio_sums(row(30.0, 30.0, NAN).log(), torch.zeros(1, 3), mask)
    near = ratio_sums(row(1.0, 1.0, NAN).log(), torch.zeros(1, 3), mask)
    assert_close(far, torch.tensor([60.0, 2.0], dtype=torch.float64))
    assert mean_ratio_exceeds(far, 20) and not mean_ratio_exceeds(near, 20)
    assert not mean_ratio_exceeds(
        far + near, 20
    )  # mean 15.5: no rank skips, neither the one that would alone
    assert mean_ratio_exceeds(far + near, 15)
    assert not mean_ratio_exceeds(torch.zeros(2), 20)  # no action anywhere


def test_a_skipped_micro_batch_has_loss_0_and_still_a_backward_pass():
    logps = row(900.0, 2.0, NAN).requires_grad_()
    mask, skip = torch.tensor([[1, 1, 0]]), torch.tensor(True)
    terms = policy_terms(logps, row(-900.0, 0.0, NAN), row(-1, 1, NAN), mask, skip=skip)
    terms.sum().backward()
    assert terms.tolist() == [[0, 0, 0]] and logps.grad.tolist() == [[0, 0, 0]]


def test_a_ratio_beyond_all_bounds_stays_finite():
    logps = row(900.0).requires_grad_()
    terms = policy_terms(logps, row(-900.0), row(-1.0), torch.ones(1, 1))
    terms.sum().backward()
    assert terms.isfinite().all() and logps.grad.isfinite().all()


def test_value_loss_takes_the_worse_of_plain_and_clipped():
    # R = 1 each. V_old 0, V .5: clipped .2, (.8)^2 > (.5)^2. V -1: clipped -.2, (2)^2 > (1.2)^2. V
    # .1: unclipped.
    terms = value_terms(row(0.5, -1.0, 0.1), row(0, 0, 0), row(1, 1, 1), ALL)
    assert_close(terms, row(0.32, 2.0, 0.405))
    assert value_statistics(row(0.5, -1.0, 0.1), row(0, 0, 0), ALL)[
        "value_clip_fraction"
    ].tolist() == [1, 1, 0]


def test_statistics_hold_no_graph():
    logps = ALL.clone().requires_grad_()
    found = value_statistics(logps, ALL, ALL)
    assert not any(samples.requires_grad for samples in selected(found).values())


def test_explained_variance():
    returns = torch.tensor([[1.0, 2.0, 3.0], [4.0, NAN, NAN]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(torch.full((2, 3), 2.5), returns, mask) == 0
    assert (
        explained_variance(torch.full((2, 3), 9.0), returns, mask) == 0
    )  # a constant error is no variance
    assert_close(explained_variance(-returns, returns, mask).item(), -3.0)  # Var(2 R) = 4 Var(R)
    assert explained_variance(returns, torch.ones(2, 3), mask) == 0  # nothing to explain


def test_explained_variance_over_ranks_is_that_of_all_rows_together():
    torch.manual_seed(0)
    returns, mask = torch.randn(5, 4), torch.rand(5, 4) > 0.3
    values = returns + torch.randn(5, 4)
    whole = explained_variance(values, returns, mask)
    parts = [(values[part], returns[part], mask[part]) for part in (slice(0, 2), slice(2, 5))]
    for found in on_ranks(lambda part, reduce_sum: explained_variance(*part, reduce_sum), parts):
        assert_close(found, whole)


def test_losses_of_a_batch_are_means_over_its_actions():
    logps, mask = row(0.5, 1, 1.5, NAN).log(), torch.tensor([[1, 1, 1, 0]])
    loss, skipped, largest = PolicyLoss()(logps, row(0.0, 0, 0, NAN), row(1, -1, 2, NAN), mask)
    assert_close(loss.item(), -1.9 / 3)
    assert_close(largest.item(), 1.5)
    assert not skipped
    # Returns 1 = advantage + old value; the values of
    # test_value_loss_takes_the_worse_of_plain_and_clipped.
    assert_close(
        ValueLoss()(row(0.5, -1.0, 0.1), row(0.0, 0, 0), row(1.0, 1, 1)).item(),
        (0.32 + 2.0 + 0.405) / 3,
    )


def test_a_batch_is_skipped_when_the_ratios_of_all_ranks_say_so():
    far, near = row(30.0).log(), row(1.0).log()

    def work(logps, reduce_sum):
        loss, skipped, _ = PolicyLoss(skip_threshold=12, reduce_sum=reduce_sum)(
            logps, row(0.0), row(1.0)
        )
        return loss.item(), skipped

    assert on_ranks(work, [far, near]) == [(0.0, True)] * 2  # mean 15.5: the near one skips too
    assert on_ranks(work, [near, near]) == [(-1.0, False)] * 2


# Aggregation

TERMS = torch.tensor([[1.0, 2.0, 3.0, NAN], [6.0, NAN, NAN, NAN], [NAN] * 4])
MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize(
    ("aggregation", "total", "num_terms"),
    [
        (LossAggregation("token-mean"), 12.0, 4),
        # The empty response is not counted.
        (LossAggregation("seq-mean-token-mean"), 2.0 + 6.0, 2),
        (LossAggregation("seq-mean-token-sum-norm", 8), 6 / 8 + 6 / 8, 2),
    ],
)
def test_loss_aggregation(aggregation, total, num_terms):
    assert (
        aggregation.total(TERMS, MASK).item() == total
        and aggregation.num_terms(MASK).item() == num_terms
    )
    # How the global batch is split into micro-batches changes neither sum.
    parts = [slice(0, 1), slice(1, 3)]
    assert sum(aggregation.total(TERMS[part], MASK[part]).item() for part in parts) == total
    assert sum(aggregation.num_terms(MASK[part]).item() for part in parts) == num_terms
    wider = torch.nn.functional.pad(TERMS, (0, 3), value=NAN), torch.nn.functional.pad(MASK, (0, 3))
    assert (
        aggregation.total(*wider).item() == total
        and aggregation.num_terms(wider[1]).item() == num_terms
    )


def test_loss_aggregation_that_cannot_be():
    assert {"token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"} == set(LOSS_AGG_MODES)
    with pytest.raises(ValueError, match="'mean'; there are token-mean, seq-mean-token-mean"):
        LossAggregation("mean")
    with pytest.raises(ValueError, match="max_new_tokens"):
        LossAggregation("seq-mean-token-sum-norm")
