import math

import torch
import torch.nn.functional as F

from coati.models.loss import GPTLMLoss, masked_mean


def test_masked_mean_by_hand():
    values = torch.tensor([[1.0, 2.0, math.nan], [4.0, math.inf, 6.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    assert masked_mean(values, mask).item() == 13 / 4
    assert masked_mean(values, mask.bool(), dim=1).tolist() == [1.5, 5.0]
    assert masked_mean(values, mask, dim=0).tolist() == [2.5, 2.0, 6.0]


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
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits))
    assert GPTLMLoss()(logits, torch.full_like(labels, -100)).item() == 0
