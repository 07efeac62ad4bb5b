"""What an environment wrote is context: whatever the model says there, loss, metrics and gradient
stay as they are."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from coati.experience_maker.experience import Experience
from coati.experience_maker.model_inputs import to_actions
from coati.models.logprobs import IGNORE_INDEX
from coati.models.policy_loss import LossAggregation
from coati.models.policy_registry import LOSS_AGG_MODES
from coati.trainer.policy_objective import PolicyObjective, PolicySettings, ValueObjective

MASK = torch.tensor([[1, 1, 0, 0, 1, 1], [1, 0, 0, 1, 0, 0]]).bool()
REAL = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()


def experience() -> Experience:
    random = torch.Generator().manual_seed(1)

    def numbers() -> Tensor:
        return torch.randn(2, 6, generator=random) * MASK

    return Experience(
        torch.randint(0, 12, (2, 9), generator=random),
        torch.cat([torch.ones(2, 3).bool(), REAL], 1),
        MASK,
        numbers() - 1,
        torch.zeros(2),
        torch.arange(2),
        values=numbers(),
        advantages=numbers(),
        returns=numbers(),
        reference_log_probs=numbers() - 1,
    )


def policy_step(logits: Tensor, mode: str) -> tuple[Tensor, dict, Tensor]:
    """Loss, metrics and gradient of ``logits`` (B, S, V)."""
    objective = PolicyObjective(
        PolicySettings(kl_coef=0.1, loss_agg=LossAggregation(mode, 16)), lambda sums: sums
    )
    (batch,) = objective.batches([experience()])
    logits = logits.clone().requires_grad_()
    labels = batch["labels"][:, 1:]
    there = labels != IGNORE_INDEX
    logps = logits[:, :-1].log_softmax(-1)
    taken = logps.gather(2, labels.clamp(min=0)[..., None])[..., 0][there]
    loss, metrics = objective.loss(taken, batch)
    loss.backward()
    return loss.detach(), metrics, logits.grad


def said_before(mask: Tensor) -> Tensor:
    """(B, S): the positions whose next token the ``mask`` (B, A) is set on."""
    return torch.cat([torch.zeros(2, 2).bool(), mask, torch.zeros(2, 1).bool()], 1)


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_the_policys_gradient(mode):
    logits = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(2))
    own = said_before(MASK)
    loss, metrics, gradient = policy_step(logits, mode)
    assert not gradient[~own].any() and gradient[own].abs().sum(1).min() > 0
    moved = torch.where(own[..., None], logits, logits + 5 * torch.randn(2, 9, 12))
    again = policy_step(moved, mode)
    assert torch.equal(again[0], loss) and torch.equal(again[2], gradient)
    for name, value in metrics.items():
        other = again[1][name]
        if isinstance(value, Tensor):
            assert torch.equal(value, other), name
        else:
            assert torch.equal(value.values[value.mask], other.values[other.mask]), name
            assert value.mask.sum() in (1, MASK.sum()), name


def test_the_values_gradient():
    objective = ValueObjective()
    (batch,) = objective.batches([experience()])
    assert int(objective.num_terms(batch)) == MASK.sum()
    values = torch.randn(2, 9, generator=torch.Generator().manual_seed(3)).requires_grad_()
    loss, _ = objective.loss(values, batch)
    loss.backward()
    own = said_before(MASK)
    assert not values.grad[~own].any()
    moved = torch.where(own, values.detach(), values.detach() + 5)
    assert torch.equal(objective.loss(moved, batch)[0], loss.detach())
    assert_close(to_actions(values.detach()[own], MASK)[~MASK], torch.zeros(int((~MASK).sum())))
