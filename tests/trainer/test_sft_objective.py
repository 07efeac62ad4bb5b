"""The supervised loss: what a token's weight does to loss and gradient."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from coati.models.head import Head
from coati.parallel.engine import Step
from coati.trainer.policy_objective import PtxObjective
from coati.trainer.sft import SFTObjective, SFTTrainer
from tests.tiny import tiny_llama

LABELS = torch.tensor([[-100, 7, 8, -100], [-100, -100, 9, -100]])
LOGPS = torch.tensor([-1.0, -2.0, -4.0])  # of 7, 8 and 9


def batch(weights: list[list[float]] | None = None) -> dict[str, torch.Tensor]:
    found = {"labels": LABELS, "input_ids": LABELS, "attention_mask": torch.ones_like(LABELS)}
    return found if weights is None else found | {"loss_weights": torch.tensor(weights)}


def mean(objective, found: dict[str, torch.Tensor], logps: torch.Tensor = LOGPS) -> torch.Tensor:
    """As the engine divides."""
    return objective.loss(logps, found)[0] / objective.num_terms(found)


@pytest.mark.parametrize("objective", [SFTObjective(), PtxObjective()])
def test_a_loss_is_the_weighted_mean(objective):
    """(0.5 x 1 + 0 x 2 + 1 x 4) / 1.5 = 3. Weights where nothing is supervised change nothing."""
    weights = [[9.0, 0.5, 0.0, 9.0], [9.0, 9.0, 1.0, 9.0]]
    assert mean(objective, batch(weights)) == 3.0
    assert mean(objective, batch()) == pytest.approx(7 / 3)


@pytest.mark.parametrize("weight", [0.5, 0.01, 1.0])
def test_the_same_weight_everywhere_changes_nothing(weight):
    logps = LOGPS.clone().requires_grad_()
    mean(SFTObjective(), batch([[weight] * 4] * 2), logps).backward()
    assert_close(logps.grad, torch.full((3,), -1 / 3))


def test_a_token_of_weight_0_is_as_if_masked():
    weights = [[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]
    masked = batch() | {"labels": LABELS.masked_fill(LABELS == 8, -100)}
    assert mean(SFTObjective(), batch(weights)) == mean(SFTObjective(), masked, LOGPS[[0, 2]])


def test_a_loss_of_ones_own_is_weighted_too():
    objective = SFTObjective(token_loss=lambda logps, batch: logps**2)
    assert mean(objective, batch([[0.0, 1.0, 0.5, 0.0], [0.0, 0.0, 0.5, 0.0]])) == 5.5


def test_every_token_alike_without_the_loss_mask():
    prepared = SFTObjective(apply_loss_mask=False).prepare(batch([[0.5] * 4] * 2))
    assert "loss_weights" not in prepared


def test_the_gradient_of_a_model_is_the_weighted_sum_by_hand():
    torch.manual_seed(0)
    model = tiny_llama()
    ids = torch.randint(3, model.config.vocab_size, (3, 17))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    weights = torch.rand(ids.shape)
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    each = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="none")
    shares = weights[:, 1:].flatten() * (labels[:, 1:].flatten() != -100)
    ((each * shares).sum() / shares.sum()).backward()
    by_hand = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    head = Head.install(model)
    head.set(labels)
    logps = model(input_ids=ids).logits[0]
    found = {"input_ids": ids, "labels": labels, "loss_weights": weights}
    mean(SFTObjective(), found, logps).backward()
    for parameter, expected in zip(model.parameters(), by_hand, strict=True):
        assert_close(parameter.grad, expected, rtol=0.0, atol=1e-6)


# Dynamic fine-tuning: -sg(p) log p


@pytest.mark.parametrize("weights", [None, [[9.0, 0.5, 0.0, 9.0], [9.0, 9.0, 1.0, 9.0]]])
def test_dynamic_finetuning_by_hand(weights):
    """p = 1/2, 1/4, 1/8: losses -p log p, gradients -p with respect to log p, each times its
    weight; nll is the metric."""
    objective = SFTObjective(token_loss="dft")
    logps = torch.tensor([0.5, 0.25, 0.125]).log().requires_grad_()
    found = batch(weights)
    each = [0.5 * math.log(2), 0.25 * math.log(4), 0.125 * math.log(8)]
    shares = [1 / 3] * 3 if weights is None else [0.5 / 1.5, 0.0, 1 / 1.5]
    loss = mean(objective, found, logps)
    assert float(loss) == pytest.approx(sum(a * b for a, b in zip(each, shares, strict=True)))
    loss.backward()
    p = torch.tensor([0.5, 0.25, 0.125])
    assert_close(logps.grad, -p * torch.tensor(shares))
    _, metrics = objective.loss(logps, found)
    assert_close(metrics["nll"].detach(), -logps.detach())
    assert SFTObjective(token_loss="nll").loss(logps, found)[1] == {}


def test_the_gradient_of_a_logit_does_not_grow_as_its_token_gets_improbable():
    """d loss / d z_target = -p (1 - p) for dft, -(1 - p) for nll (arXiv 2508.05629, section 3)."""
    for name, expected in (("dft", lambda p: -p * (1 - p)), ("nll", lambda p: p - 1)):
        for target in (4.0, 0.0, -6.0):
            z = torch.tensor([target, 0.0, 1.0], requires_grad=True)
            logps = z.log_softmax(0)[:1]
            SFTObjective(token_loss=name).loss(logps, batch())[0].backward()
            p = float(logps.exp())
            assert float(z.grad[0]) == pytest.approx(expected(p), rel=1e-4, abs=1e-7)


def test_the_loss_of_a_model_through_the_chunked_head_is_that_of_its_logits():
    torch.manual_seed(0)
    model = tiny_llama()
    ids = torch.randint(3, model.config.vocab_size, (3, 17))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    each = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="none")
    shares = (labels[:, 1:].flatten() != -100) * (-each).exp().detach()
    (each * shares).sum().backward()
    by_hand = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    head = Head.install(model, chunk_rows=4)
    head.set(labels)
    logps = model(input_ids=ids).logits[0]
    SFTObjective(token_loss="dft").loss(logps, {"labels": labels})[0].backward()
    for parameter, expected in zip(model.parameters(), by_hand, strict=True):
        assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-5)


def test_perplexity_is_that_of_the_tokens_under_any_loss():
    """exp of the mean -log p: of dft, and of a loss of one's own, not exp of the loss."""
    trainer = SFTTrainer.__new__(SFTTrainer)
    nll = [torch.tensor([math.log(2), math.log(4)]), torch.tensor([math.log(8)])]
    found = trainer.evaluation_metrics(Step(0.3, 3, metrics={"nll": nll}))
    assert found == {"loss": 0.3, "perplexity": pytest.approx(4.0)}
    plain = trainer.evaluation_metrics(Step(math.log(3), 3))
    assert plain["perplexity"] == pytest.approx(3.0)


def test_a_loss_that_there_is_not():
    with pytest.raises(ValueError, match="sft_loss 'focal': choose from nll, dft"):
        SFTObjective(token_loss="focal")
