"""Every loss by hand-worked values; NaN where a mask is 0 never matters."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from coati.models.loss import (
    GPTLMLoss,
    LogExpLoss,
    LogSigLoss,
    balance,
    centering,
    kto_baseline,
    kto_loss,
    length_desensitized,
    log_exp_loss,
    log_odds,
    log_sig_loss,
    masked_mean,
    masked_sum,
    odds_ratio_loss,
    reward_loss,
)
from coati.models.loss_registry import REWARD_LOSSES

LN2 = math.log(2)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def test_masked_mean_by_hand():
    values = torch.tensor([[1.0, 2.0, math.nan], [4.0, math.inf, 6.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    assert masked_mean(values, mask).item() == 13 / 4
    assert masked_mean(values, mask.bool(), dim=1).tolist() == [1.5, 5.0]
    assert masked_mean(values, mask, dim=0).tolist() == [2.5, 2.0, 6.0]
    assert masked_sum(values, mask, dim=1).tolist() == [3.0, 10.0]


def test_masked_mean_of_nothing_is_zero_with_a_zero_gradient():
    values = torch.tensor([[math.nan, 1.0]], requires_grad=True)
    mean = masked_mean(values, torch.zeros(1, 2))
    mean.backward()
    assert mean.item() == 0 and values.grad.tolist() == [[0.0, 0.0]]


def test_gpt_lm_loss_is_shifted_cross_entropy():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 11, requires_grad=True)
    labels = torch.randint(0, 11, (2, 5))
    labels[0, :3] = -100
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1))
    found = GPTLMLoss()(logits, labels)
    assert_close(found, expected)
    assert_close(torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits))
    assert GPTLMLoss()(logits, torch.full_like(labels, -100)).item() == 0


def test_each_name_has_its_function():
    assert all(callable(reward_loss(name)) for name in REWARD_LOSSES)


def test_reward_losses_by_hand_are_one_number():
    """Differences 2, 0, -1 and margins 0, 0, 1: softplus(-2), ln 2, softplus(2)."""
    chosen, rejected, margin = tensor(3.0, 1.0, 0.0), tensor(1.0, 1.0, 1.0), tensor(0.0, 0.0, 1.0)
    expected = tensor(math.log1p(math.exp(-2)), LN2, math.log1p(math.exp(2)))
    assert_close(log_sig_loss(chosen, rejected, margin), expected)
    assert_close(log_exp_loss(chosen, rejected, margin), expected)
    assert_close(LogSigLoss()(chosen, rejected), LogExpLoss()(chosen, rejected))
    assert log_exp_loss(tensor(0.0), tensor(500.0)).item() == 500  # log(1 + exp) would be infinite
    assert log_sig_loss(chosen.half(), rejected.half()).dtype == torch.float32


def test_centering_by_hand():
    assert centering(tensor(2.0, -1.0), tensor(1.0, 1.0)).tolist() == [9.0, 0.0]


def test_log_odds_ratio_by_hand():
    """Average log-probs -1.05 and -1: log odds -.619313 and -.541325."""
    chosen, rejected = tensor(-0.1, -2.0).mean()[None], tensor(-1.0, -1.0).mean()[None]
    value, ratio = odds_ratio_loss(chosen, rejected)
    assert ratio.item() == pytest.approx(-0.0780, abs=5e-5)
    assert value.item() == pytest.approx(math.log1p(math.exp(0.077988)), abs=1e-5)
    assert log_odds(tensor(math.log(0.75))).item() == pytest.approx(math.log(3), abs=1e-6)


def test_log_odds_of_certainty_and_of_the_impossible_have_gradients():
    logps = torch.tensor([0.0, -1e-9, -1e-6, -1e3], requires_grad=True)
    odds = log_odds(logps)
    odds.sum().backward()
    assert odds.isfinite().all() and logps.grad.isfinite().all()


def test_kto_by_hand():
    """beta .1, z 2: h = 12 desirable: 1 - sigmoid(1); h = -8 undesirable: 1 - sigmoid(1), times
    3."""
    found = kto_loss(tensor(12.0, -8.0), torch.tensor([True, False]), 2.0, 0.1, 1.0, 3.0)
    assert_close(found, tensor(1 - sigmoid(1.0), 3 * (1 - sigmoid(1.0))))


def test_kto_of_one_label_has_no_nan():
    advantage = torch.tensor([5.0, -1e6, 1e6], requires_grad=True)
    for label in (torch.ones(3), torch.zeros(3)):
        values = kto_loss(advantage, label, 0.0)
        (gradient,) = torch.autograd.grad(values.sum(), advantage)
        assert values.isfinite().all() and gradient.isfinite().all()


def test_kto_baseline_is_the_mean_but_not_negative():
    assert kto_baseline(6.0, 4) == 1.5
    assert kto_baseline(-6.0, 4) == 0.0
    assert kto_baseline(0.0, 0) == 0.0


def test_balance_by_hand():
    assert balance(30, 10, 1.0, 2.0) == 1.5


def test_length_desensitized_by_hand():
    """Responses of 3 and 1 tokens: of the longer, the first token counts fully, the two others
    half."""
    logps = torch.tensor([[math.nan, -1.0, -2.0, -4.0], [math.nan, math.nan, -8.0, math.nan]])
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0]])
    assert length_desensitized(logps, mask, 0.5).tolist() == [-4.0, -8.0]
    assert length_desensitized(logps, mask, 1.0).tolist() == masked_sum(logps, mask, 1).tolist()
    assert length_desensitized(logps, mask, 0.0).tolist() == [-1.0, -8.0]
