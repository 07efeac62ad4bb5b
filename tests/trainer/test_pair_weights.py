"""Pairs that count more or less: by a column of the rows, and by the policy's probability (WPO)."""

import pytest
import torch
from torch.testing import assert_close

from coati.dataset.load.collator import DataCollatorForPreferenceDataset
from coati.models.head_outputs import HeadRequest, outputs_from_logits
from coati.models.pairwise_loss import PairwiseObjective
from coati.models.reward_model import RewardModel
from coati.trainer.dpo import DPOObjective
from coati.trainer.orpo import ORPOObjective
from coati.trainer.rm import RewardModelObjective
from tests.experience_maker.engines import engine_of, group_of_one
from tests.tiny import tiny_llama, tiny_tokenizer

ROWS = [([5, 6], [7, 8], [9]), ([11], [12], [13, 14, 15]), ([21, 22], [23, 24], [25])]


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    with group_of_one(tmp_path_factory.mktemp("group")):
        yield


@pytest.fixture(scope="module")
def model():
    return tiny_llama(seed=0)


def batch(*weights, rows=(0, 1, 2), longest=16):
    made = []
    for number, row in enumerate(rows):
        prompt, chosen, rejected = ROWS[row]
        columns = {}
        for side, response in (("chosen", chosen), ("rejected", rejected)):
            columns[f"{side}_input_ids"] = prompt + response
            columns[f"{side}_loss_mask"] = [False] * len(prompt) + [True] * len(response)
        if weights and weights[number] is not None:
            columns["weight"] = weights[number]
        made.append(columns)
    collate = DataCollatorForPreferenceDataset(tiny_tokenizer(), longest)
    return collate(made)


OBJECTIVES = {
    "dpo": lambda: DPOObjective(PairwiseObjective.of("dpo_loss")),
    "mpo": lambda: DPOObjective(
        PairwiseObjective.of(["dpo_loss", "bco_pair", "sft"], [0.8, 0.2, 1.0])
    ),
    "orpo": ORPOObjective,
    "rm": lambda: RewardModelObjective(center_coef=0.1),
}


def taken(kind, model, batches, **changes):
    objective = OBJECTIVES[kind]()
    for name, value in changes.items():
        setattr(objective, name, value)
    if kind == "rm":
        torch.manual_seed(3)
        model = RewardModel(backbone=tiny_llama(seed=0))
        torch.nn.init.normal_(model.score.weight, std=0.5)
    engine = engine_of(model)
    engine.optimizer.zero_grad()
    step = engine.train_step(batches, objective)
    return step, engine.optimizer.found


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_weight_of_2_is_the_pair_twice_and_of_0_none(model, kind):
    step, gradient = taken(kind, model, [batch(2.0, 0.0, 1.0)])
    other, expected = taken(kind, model, [batch(rows=(0, 0, 2))])
    assert step.num_terms == 3 and step.loss == pytest.approx(other.loss, rel=1e-5)
    assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    losses = [taken(kind, model, [batch(rows=(row,))])[0].loss for row in range(3)]
    mixed, found = taken(kind, model, [batch(0.5, 2.0, 0.25)])
    mean = (0.5 * losses[0] + 2.0 * losses[1] + 0.25 * losses[2]) / 2.75
    assert mixed.num_terms == 2.75 and mixed.loss == pytest.approx(mean, rel=1e-5)
    cut, same = taken(kind, model, [batch(0.5, rows=(0,)), batch(2.0, 0.25, rows=(1, 2))])
    assert cut.loss == pytest.approx(mixed.loss, rel=1e-5)
    assert_close(same, found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_no_weight_is_1_and_rows_without_any_have_no_column(model, kind):
    assert "weight" not in batch() and batch(None, 1.0, None)["weight"].tolist() == [1, 1, 1]
    plain, expected = taken(kind, model, [batch()])
    step, found = taken(kind, model, [batch(None, 1.0, None)])
    assert step.loss == pytest.approx(plain.loss, rel=1e-6) and step.num_terms == 3
    assert_close(found, expected, rtol=1e-5, atol=1e-7)
    # A micro-batch with weights beside one without.
    mixed, _ = taken(kind, model, [batch(rows=(0, 1)), batch(1.0, rows=(2,))])
    assert mixed.loss == pytest.approx(plain.loss, rel=1e-5) and mixed.num_terms == 3
    nothing, found = taken(kind, model, [batch(0.0, 0.0, 0.0)])
    assert nothing.num_terms == 0 and nothing.loss == 0 and not found.any()


def by_hand(model, row: int) -> float:
    """WPO's weight of a pair, from whole distributions."""
    prompt, *responses = ROWS[row]
    weight = 1.0
    for response in responses:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
        p = logits[len(prompt) - 1 : -1].double().softmax(-1)
        chosen = p.gather(1, torch.tensor(response)[:, None])[:, 0]
        weight *= float((chosen.log() - p.square().sum(1).log()).mean().exp())
    return weight


def test_wpo_by_hand(model):
    """Each pair's loss times its weight, mean over pairs; no gradient through the weights."""
    weights = [by_hand(model, row) for row in range(3)]
    assert len({round(weight, 3) for weight in weights}) == 3
    alone = [taken("dpo", model, [batch(rows=(row,))]) for row in range(3)]
    step, found = taken("dpo", model, [batch()], wpo=True)
    mean = sum(w * each.loss for w, (each, _) in zip(weights, alone, strict=True)) / 3
    assert step.num_terms == 3 and step.loss == pytest.approx(mean, rel=1e-5)
    gradient = sum(w * each for w, (_, each) in zip(weights, alone, strict=True)) / 3
    assert_close(found, gradient, rtol=1e-4, atol=1e-6)
    told = torch.cat([each.selected() for each in step.metrics["wpo_weight"]])
    assert_close(told, torch.tensor(weights), rtol=1e-4, atol=1e-6)
    both, _ = taken("dpo", model, [batch(2.0, 0.0, 1.0)], wpo=True)
    mean = (2 * weights[0] * alone[0][0].loss + weights[2] * alone[2][0].loss) / 3
    assert both.loss == pytest.approx(mean, rel=1e-5)


def test_of_a_pair_that_the_policy_is_sure_of_the_weight_is_1():
    """One token has nearly all of the probability: it is as probable as what is sampled."""
    logits = torch.zeros(1, 3, 8)
    logits[..., 5] = 30.0
    found = outputs_from_logits(
        logits, torch.tensor([[5, 5, 5]]), HeadRequest(entropy=True, entropy_order=2)
    )
    assert_close(found.logps + found.entropy, torch.zeros(1, 2), atol=1e-6, rtol=0)


def test_the_collision_entropy_by_hand():
    """p = 1/2, 1/4, 1/4: sum p^2 = 3/8. It has no gradient."""
    logits = torch.tensor([[[0.5, 0.25, 0.25], [1.0, 1.0, 1.0]]]).log().requires_grad_()
    request = HeadRequest(entropy=True, entropy_order=2)
    found = outputs_from_logits(logits, torch.tensor([[0, 1]]), request)
    assert_close(found.entropy, torch.tensor([[8 / 3]]).log())
    with pytest.raises(NotImplementedError, match="collision entropy"):
        found.entropy.sum().backward()
