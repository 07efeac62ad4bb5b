"""The DPO step on the policy's own pairs: by hand, against another implementation, and however a
global batch is cut; beta over the episodes; what the diagnostics find."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from coati.experience_maker.experience import concatenate
from coati.experience_maker.pairs import pairs_of
from coati.models.loss_registry import LOSS_TYPES
from coati.models.pairwise_loss import Pair, PairwiseObjective
from coati.trainer.monitor.pair_checks import PairChecks
from coati.trainer.online_dpo import OnlineDPOObjective, PairLossSettings, part_of
from tests.experience_maker.engines import engine_of, group_of_one
from tests.experience_maker.test_experience import experience
from tests.tiny import tiny_llama

PROMPTS = [[11, 12, 13], [11, 12, 13], [21], [21]]
ANSWERS = [[14, 15], [22, 23, 24], [33, 2], [43, 44, 45, 2]]
REWARDS = torch.tensor([1.0, 3.0, 2.5, 2.0])


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    with group_of_one(tmp_path_factory.mktemp("group")):
        yield


@pytest.fixture(scope="module")
def models():
    return tiny_llama(seed=0), tiny_llama(seed=7)


def token_logps(model, row: int) -> torch.Tensor:
    prompt, answer = PROMPTS[row], ANSWERS[row]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def pairs(models, rewards=REWARDS, left=0, right=0, junk=0.0):
    """Of the four responses, with log-probs of policy and reference."""
    policy, reference = models
    one = experience(PROMPTS, ANSWERS, left=left, right=right, junk=junk)
    numbers = torch.full(one.action_mask.shape, junk)
    old, ref = numbers.clone(), numbers.clone()
    for row, answer in enumerate(ANSWERS):
        old[row, : len(answer)] = token_logps(policy, row)
        ref[row, : len(answer)] = token_logps(reference, row)
    one = replace(one, action_log_probs=old, reference_log_probs=ref)
    return pairs_of(one, rewards, 2)[0]


def step_of(models, batches, **settings):
    """The step of real engine, and its gradient."""
    engine = engine_of(models[0])
    objective = OnlineDPOObjective(PairLossSettings(**settings), lambda sums: sums)
    objective.first_pass = True
    engine.optimizer.zero_grad()
    step = engine.train_step(objective.batches(batches), objective)
    return step, engine.optimizer.found


def mean(step, name):
    return float(torch.cat([each.selected() for each in step.metrics[name]]).mean())


# Loss, gradient norm and means of one step of TRL 1.16's OnlineDPOTrainer on these two models,
# prompts, responses and rewards (tiny_llama 0 and 7); its missing_eos_penalty takes 2.5 from the
# first two, which changes nothing of their order.
TRL = {
    0.1: (0.67963707, 1.18228767, 0.00095935, -0.02666831),
    0.5: (0.63163716, 5.65726985, 0.00479674, -0.13334155),
}


@pytest.mark.parametrize("beta", TRL)
def test_a_step_is_trls(models, beta):
    step, gradient = step_of(models, [pairs(models)], beta=[beta])
    loss, norm, chosen, rejected = TRL[beta]
    assert step.loss == pytest.approx(loss, rel=1e-5) and step.num_terms == 2
    assert float(gradient.norm()) == pytest.approx(norm, rel=1e-4)
    assert mean(step, "chosen_rewards") == pytest.approx(chosen, abs=2e-6)
    assert mean(step, "rejected_rewards") == pytest.approx(rejected, abs=2e-6)
    assert mean(step, "accuracy") == 0.5
    assert mean(step, "lp_chosen") == pytest.approx(-14.868370, rel=1e-5)
    assert mean(step, "lp_rejected") == pytest.approx(-18.148159, rel=1e-5)


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_every_loss_is_the_one_of_dpo(models, name):
    """By the log-probs of the four responses: rows 1 and 0 make a pair, and rows 2 and 3."""
    smoothing = 0.1 if "label_smoothing" in LOSS_TYPES[name].takes else 0.0
    gamma = 0.0 if smoothing else None
    step, _ = step_of(
        models, [pairs(models)], loss_type=name, beta=[0.3], label_smoothing=smoothing, gamma=gamma
    )
    sums = [[token_logps(model, row).sum() for row in range(4)] for model in models]
    own, ref = (torch.stack(each) for each in sums)
    lengths = torch.tensor([len(answer) for answer in ANSWERS])
    best, worst = [1, 2], [0, 3]
    pair = Pair(own[best], own[worst], ref[best], ref[worst], lengths[best], lengths[worst])
    given = {"beta": 0.3, "label_smoothing": smoothing, "gamma": gamma}
    assert step.loss == pytest.approx(float(PairwiseObjective.of(name, **given)(pair).mean()), 1e-5)


def test_several_losses_and_the_sft_loss_of_the_chosen(models):
    """0.8 sigmoid + 0.2 bco_pair + 1 sft (MPO)."""
    names = ["dpo_loss", "bco_pair"]
    alone = [step_of(models, [pairs(models)], loss_type=name)[0].loss for name in names]
    nll = -sum(float(token_logps(models[0], row).mean()) for row in (1, 2)) / 2
    mixed, _ = step_of(
        models, [pairs(models)], loss_type=[*names, "sft"], loss_weights=[0.8, 0.2, 1.0]
    )
    assert mixed.loss == pytest.approx(0.8 * alone[0] + 0.2 * alone[1] + nll, rel=1e-5)


def test_a_tie_does_not_count(models):
    tied, found = step_of(models, [pairs(models, torch.tensor([1.0, 3.0, 2.0, 2.0]))])
    both, _ = step_of(models, [pairs(models)])
    alone, expected = step_of(models, [pairs(models).select([0, 1])])
    assert tied.num_terms == 1 and tied.loss == pytest.approx(alone.loss, rel=1e-6) != both.loss
    assert_close(found, expected, rtol=1e-5, atol=1e-7)
    nothing, found = step_of(models, [pairs(models, torch.ones(4))])
    assert nothing.num_terms == 0 and nothing.loss == 0 and not found.any()


@pytest.mark.parametrize("ld_alpha", [None, 0.5])
def test_padding_and_how_a_global_batch_is_cut_change_nothing(models, ld_alpha):
    whole, gradient = step_of(models, [pairs(models)], ld_alpha=ld_alpha)
    wide = pairs(models, left=3, right=5, junk=float("nan"))
    for cut in ([wide], [wide.select([0, 1]), wide.select([2, 3])], [wide.select([2, 3, 0, 1])]):
        step, found = step_of(models, cut, ld_alpha=ld_alpha)
        assert step.loss == pytest.approx(whole.loss, rel=1e-5) and step.num_terms == 2
        assert_close(found, gradient, rtol=1e-4, atol=1e-6)
    more = concatenate([pairs(models), pairs(models)])
    assert step_of(models, [more], ld_alpha=ld_alpha)[0].loss == pytest.approx(whole.loss, rel=1e-5)


def test_a_function_of_the_users(models):
    step, _ = step_of(models, [pairs(models)], loss=lambda pair: pair.d.square())
    ours, _ = step_of(models, [pairs(models)], loss=lambda pair: pair.c - pair.r, beta=[0.1])
    margin = mean(ours, "margin") / 0.1
    assert ours.loss == pytest.approx(margin, rel=1e-4) and step.loss > 0


def test_beta_goes_through_its_values_in_equal_parts():
    assert [part_of(episode, 6, 3) for episode in range(8)] == [0, 0, 1, 1, 2, 2, 2, 2]
    assert [part_of(episode, 5, 2) for episode in range(5)] == [0, 0, 0, 1, 1]
    assert {part_of(episode, 4, 1) for episode in range(5)} == {0}
    objective = OnlineDPOObjective(PairLossSettings(beta=[0.3, 0.1]), lambda sums: sums)
    assert [one.primary.settings.beta for one in objective.objectives] == [0.3, 0.1]
    assert objective.beta == 0.3
    simpo = OnlineDPOObjective(PairLossSettings("simpo_loss"), lambda sums: sums)
    assert simpo.beta == 2.0


def findings(episodes, **settings) -> str:
    checks = PairChecks(**({"fp32": True, "max_new_tokens": 20} | settings))
    said = [line for number, each in enumerate(episodes) for line in checks.check(each, number)]
    return "\n".join(said)


HEALTHY = {"reward_std": 1.0, "approx_kl": 1.0, "response_length": 10.0, "ties": 0.2}
HEALTHY |= {"chosen_length": 11.0, "rejected_length": 10.0, "stop_rate": 1.0, "distinct_2": 0.5}


def test_the_diagnostics_of_a_run():
    rising = [HEALTHY | {"reward": number / 10} for number in range(40)]
    assert findings(rising) == ""
    ties = findings([one | {"ties": 0.97} for one in rising])
    assert "97% of the pairs are ties" in ties and "--num_generations" in ties
    longer = [
        one | {"response_length": 10.0 + number, "chosen_length": 20.0, "rejected_length": 12.0}
        for number, one in enumerate(rising)
    ]
    assert "may be length alone" in findings(longer)
    assert findings([one | {"chosen_length": 20.0} for one in rising]) == "", "they do not grow"
    kl = findings([one | {"approx_kl": 2.0 * n, "reward": n / 10} for n, one in enumerate(rising)])
    assert "diverging" in kl and "Raise --beta, lower --lr" in kl and "--kl_" not in kl
    flat = findings([HEALTHY | {"reward": math.sin(n) / 100} for n in range(80)])
    assert "has not risen" in flat and "lower --beta" in flat and "--kl_" not in flat


def test_the_diagnostics_go_on_after_a_resume():
    checks = PairChecks(fp32=True)
    for number in range(9):
        assert not checks.check(HEALTHY | {"reward": 1.0, "ties": 1.0}, number)
    again = PairChecks(fp32=True)
    again.load_state_dict(checks.state_dict())
    assert any("ties" in line for line in again.check(HEALTHY | {"reward": 1.0, "ties": 1.0}, 9))
