"""The losses of policy, critic and pretraining rows as steps of a real engine: by hand, and however
a window is cut."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from coati.experience_maker.experience import (
    concatenate,
    make_experience_batch,
    split_experience_batch,
)
from coati.models.critic import Critic
from coati.models.policy_loss import LossAggregation
from coati.models.policy_registry import LOSS_AGG_MODES, POLICY_LOSSES
from coati.models.rollout_correction import RolloutCorrection
from coati.models.surrogate_loss import SurrogateSettings
from coati.parallel.objective import LossPart
from coati.trainer.boosted_rl import policy_settings
from coati.trainer.policy_objective import (
    PolicyObjective,
    PolicySettings,
    PtxObjective,
    ValueObjective,
)
from tests.experience_maker.engines import engine_of, gradients, group_of_one
from tests.experience_maker.test_experience import experience
from tests.tiny import tiny_llama

PROMPTS = [[11, 12, 13], [21], [31, 32], [41, 42]]
ANSWERS = [[14, 15], [22, 23, 24], [33], [43, 44, 45, 46]]
TEMPERATURE = 0.7


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    with group_of_one(tmp_path_factory.mktemp("group")):
        yield


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture
def actor(model):
    return engine_of(model)


def plain_logps(model, row: int) -> torch.Tensor:
    """Of the unpadded row alone, with gradient."""
    prompt, answer = PROMPTS[row], ANSWERS[row]
    logits = (
        model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        / TEMPERATURE
    )
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def sampled(model, *, moved: float = 0.0, junk: float = 0.0, left: int = 0, right: int = 0):
    """The four rows with log-probs of the model itself less ``moved`` a token, and unequal
    advantages."""
    made = experience(PROMPTS, ANSWERS, left=left, right=right, junk=junk)
    numbers = torch.full(made.action_mask.shape, junk)
    old, advantages = numbers.clone(), numbers.clone()
    with torch.no_grad():
        for row, answer in enumerate(ANSWERS):
            old[row, : len(answer)] = plain_logps(model, row) - moved * (row + 1)
            advantages[row, : len(answer)] = torch.arange(len(answer)) - 0.5 * row + 0.3
    reference = old - 0.2
    return replace(made, action_log_probs=old, advantages=advantages, reference_log_probs=reference)


def objective_of(reduce_sum=lambda sums: sums, **settings) -> PolicyObjective:
    objective = PolicyObjective(PolicySettings(**settings), reduce_sum)
    objective.temperature = TEMPERATURE
    return objective


def taken(engine, objective, window, **more):
    """The step and its gradient."""
    engine.optimizer.zero_grad()  # what the test itself has left
    step = engine.train_step(objective.batches(window), objective, **more)
    return step, engine.optimizer.found


def samples_of(step, name: str) -> torch.Tensor:
    return torch.cat([samples.selected() for samples in step.metrics[name]])


def test_the_first_window_is_reinforce(model, actor):
    """Ratio 1: the loss is minus the mean advantage, its gradient minus the mean of A grad log
    p."""
    one = sampled(model)
    step, gradient = taken(actor, objective_of(), [one])
    assert step.loss == pytest.approx(-float(one.advantages[one.action_mask].mean()), rel=1e-6)
    assert step.num_terms == 10
    model.zero_grad()
    rows = [
        -(plain_logps(model, row) * one.advantages[row, : len(ANSWERS[row])]).sum()
        for row in range(4)
    ]
    (sum(rows) / 10).backward()
    expected = gradients(model)
    assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    assert (
        samples_of(step, "update_kl").abs().max() < 1e-5
        and samples_of(step, "ratio_max").max() < 1.001
    )
    entropy = samples_of(step, "sampled_entropy")
    assert entropy.mean() == pytest.approx(
        -float(one.action_log_probs[one.action_mask].mean()), rel=1e-6
    )


CUTS = {
    "two and two": lambda one: [one.select([0, 1]), one.select([2, 3])],
    "one by one": split_experience_batch,
    "another order": lambda one: [one.select([3, 1]), one.select([0]), one.select([2])],
    "more padding": lambda one: [concatenate([one, sampled_wide(one)]).select([0, 1, 2, 3])],
    "put together again": lambda one: [make_experience_batch(split_experience_batch(one))],
}


def sampled_wide(one):
    """Another row, with more of both kinds of padding, that only widens."""
    return experience([[1] * 9], [[2] * 8]).__class__(
        **{name: value[:1] for name, value in one._resized(6, 4).tensors().items()}
    )


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
@pytest.mark.parametrize("cut", CUTS)
def test_how_a_window_is_cut_changes_nothing(model, actor, cut, mode):
    settings = {
        "loss_agg": LossAggregation(mode, 6),
        "kl_coef": 0.3,
        "surrogate": SurrogateSettings(clip_low=0.1, clip_high=0.3),
    }
    check_cut(model, actor, cut, settings)


@pytest.mark.parametrize("cut", ["two and two", "one by one", "more padding"])
@pytest.mark.parametrize("name", [name for name in POLICY_LOSSES if name != "ppo"])
def test_nor_with_any_other_loss_and_an_entropy_bonus(model, actor, cut, name):
    mode = POLICY_LOSSES[name].loss_agg_mode
    surrogate = SurrogateSettings(name, 0.1, 0.3, cispo_cap=1.2)
    settings = {"loss_agg": LossAggregation(mode), "surrogate": surrogate, "entropy_coef": 0.2}
    check_cut(model, actor, cut, settings)


def check_cut(model, actor, cut, settings) -> None:
    one = sampled(model, moved=0.1)
    whole, gradient = taken(actor, objective_of(**settings), [one])
    step, found = taken(actor, objective_of(**settings), CUTS[cut](one))
    assert step.loss == pytest.approx(whole.loss, rel=1e-5) and step.num_terms == whole.num_terms
    assert_close(found, gradient, rtol=1e-4, atol=1e-6)
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_masked_cells_are_nothing(model, actor, packed, name):
    settings = {"kl_coef": 0.3, "surrogate": SurrogateSettings(name), "entropy_coef": 0.1}
    step, gradient = taken(actor, objective_of(**settings), [sampled(model, moved=0.1)])
    spoiled = sampled(model, moved=0.1, junk=float("nan"), left=2, right=3)
    other, found = taken(engine_of(model, packed), objective_of(**settings), [spoiled])
    assert other.loss == pytest.approx(step.loss, rel=1e-5)
    assert_close(found, gradient, rtol=1e-4, atol=1e-6)


def test_the_entropy_bonus_is_that_of_the_whole_distribution(model, actor):
    """Loss and gradient are less by C x the mean of -sum p log p, of logits over the
    temperature."""
    one = sampled(model)
    plain, gradient = taken(actor, objective_of(), [one])
    step, found = taken(actor, objective_of(entropy_coef=0.3), [one])
    model.zero_grad()
    entropies = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        logp = (logits / TEMPERATURE).log_softmax(-1)
        entropies.append(-(logp.exp() * logp).sum(-1))
    entropy = torch.cat(entropies)
    assert step.loss == pytest.approx(plain.loss - 0.3 * float(entropy.mean()), rel=1e-5)
    assert samples_of(step, "policy_entropy").mean() == pytest.approx(
        float(entropy.mean()), rel=1e-5
    )
    assert "policy_entropy" not in plain.metrics
    entropy.mean().backward()
    assert_close(found, gradient - 0.3 * gradients(model), rtol=1e-4, atol=1e-6)


def test_importance_weights_are_not_of_the_entropy_bonus(model, actor):
    """With weights 0 the bonus alone is left."""
    one = sampled(model)
    old = replace(
        one,
        sampled_log_probs=one.action_log_probs - 5,
        version=torch.full((4,), 7),
    )
    kept = RolloutCorrection(keep=(0.5, 2.0))
    bonus, gradient = taken(actor, objective_of(entropy_coef=0.3, correction=kept), [old])
    none, _ = taken(actor, objective_of(correction=kept), [old])
    assert none.loss == 0 and bonus.loss < -0.1 and gradient.abs().max() > 1e-4


def test_kl_in_the_loss(model, actor):
    one = sampled(model)
    step, _ = taken(actor, objective_of(kl_coef=0.5), [one])
    k3 = math.exp(-0.2) - 1 + 0.2  # the policy is 0.2 above its reference everywhere
    assert step.loss == pytest.approx(
        -float(one.advantages[one.action_mask].mean()) + 0.5 * k3, rel=1e-5
    )
    step, _ = taken(actor, objective_of(kl_coef=0.5, kl_estimator="k1"), [one])
    assert step.loss == pytest.approx(
        -float(one.advantages[one.action_mask].mean()) + 0.5 * 0.2, rel=1e-5
    )


def test_dropped_rows_count_for_nothing(model, actor):
    one = sampled(model, moved=0.1)
    kept, gradient = taken(actor, objective_of(), [one.select([0, 2, 3])])
    one.action_mask[1] = False
    step, found = taken(actor, objective_of(), [one])
    assert step.num_terms == kept.num_terms == 7 and step.loss == pytest.approx(kept.loss, rel=1e-5)
    assert_close(found, gradient, rtol=1e-4, atol=1e-6)
    one.action_mask[:] = False
    step, found = taken(actor, objective_of(), [one])
    assert step.loss == 0 and not found.any()


def test_the_skip_is_decided_by_all_ranks(model, actor):
    """Ratios here are about 1. Another rank's are not, and all leave the step out; KL in the loss
    too."""
    one = sampled(model)
    for others, skipped in (((0.0, 0.0), False), ((1000.0, 10.0), True)):
        objective = objective_of(
            lambda sums, others=others: sums + torch.tensor(others), kl_coef=0.5
        )
        step, gradient = taken(actor, objective, [one])
        assert [float(value) for value in step.metrics["skip_ratio"]] == [float(skipped)]
        assert bool(gradient.any()) != skipped and (step.loss == 0) == skipped


def test_rollout_and_update_are_compared_in_the_first_pass_alone(model, actor):
    objective = objective_of()
    assert "rollout_gap" not in taken(actor, objective, [sampled(model)])[0].metrics
    objective.first_pass = True
    step, _ = taken(actor, objective, [sampled(model, moved=0.1)])
    gaps = samples_of(step, "rollout_gap")
    assert len(gaps) == 10 and float(gaps.max()) == pytest.approx(0.4, abs=1e-4)


def supervised():
    ids = torch.tensor([[5, 9, 17, 30], [7, 40, 3, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("c", [0.25, 1.0])
def test_pretraining_rows_beside_the_policy(model, actor, c):
    """(1 - c) x policy + c x supervised, the latter at temperature 1."""
    one, batch = sampled(model), supervised()
    _, policy = taken(actor, objective_of(), [one])
    also = [LossPart([batch], PtxObjective(), c)]
    step, found = taken(actor, objective_of(), [one], weight=1 - c, aux_losses=also)
    model.zero_grad()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    loss.backward()
    expected = gradients(model)
    assert step.aux_losses == [pytest.approx(float(loss), rel=1e-5)]
    assert step.loss == pytest.approx(-float(one.advantages[one.action_mask].mean()), rel=1e-5)
    assert_close(found, (1 - c) * policy + c * expected, rtol=1e-4, atol=1e-6)
    assert actor.temperature == 1.0


# Critic


@pytest.fixture(scope="module")
def critic():
    torch.manual_seed(4)
    critic = Critic(backbone=tiny_llama(seed=2))
    torch.nn.init.normal_(critic.score.weight, std=0.1)
    return critic


def plain_values(critic, row: int) -> torch.Tensor:
    """V of the states before the actions, of the unpadded row."""
    ids = torch.tensor([PROMPTS[row] + ANSWERS[row]])
    states = critic.score(critic.backbone(input_ids=ids)[0])[0]
    return states.flatten()[len(PROMPTS[row]) - 1 : -1]


def judged(critic, junk: float = 0.0, **padding: int):
    made = experience(PROMPTS, ANSWERS, junk=junk, **padding)
    old, returns = (
        torch.full(made.action_mask.shape, junk),
        torch.full(made.action_mask.shape, junk),
    )
    with torch.no_grad():
        for row, answer in enumerate(ANSWERS):
            old[row, : len(answer)] = plain_values(critic, row) + 0.1 * row
            returns[row, : len(answer)] = torch.arange(len(answer)) - row
    return replace(made, values=old, returns=returns)


@pytest.mark.parametrize("packed", [False, True])
def test_the_critics_loss(critic, packed):
    one, objective = judged(critic), ValueObjective(0.15)
    engine = engine_of(critic, packed)
    step, gradient = taken(engine, objective, [one])
    critic.zero_grad()
    terms = []
    for row, answer in enumerate(ANSWERS):
        values, old = plain_values(critic, row), one.values[row, : len(answer)]
        returns = one.returns[row, : len(answer)]
        near = old + (values - old).clamp(-0.15, 0.15)
        terms.append(0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2))
    loss = torch.cat(terms).mean()
    loss.backward()
    assert step.loss == pytest.approx(float(loss), rel=1e-4) and step.num_terms == 10
    assert_close(gradient, gradients(critic), rtol=1e-3, atol=1e-5)
    clipped = samples_of(step, "value_clip_fraction")
    assert float(clipped.sum()) == 5  # the last two rows have moved by 0.2 and 0.3
    for cut in (split_experience_batch(one), [judged(critic, float("nan"), left=1, right=2)]):
        again, found = taken(engine, objective, cut)
        assert again.loss == pytest.approx(step.loss, rel=1e-4)
        assert_close(found, gradient, rtol=1e-3, atol=1e-5)


def test_without_an_output_embedding_full_logits_are_read(model, monkeypatch):
    """A model that does not name its vocabulary head, as ChatGLM's, gives the same log-probs."""
    batch = supervised()
    expected = engine_of(model).forward(batch)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    engine = engine_of(model)
    assert engine.head is None and expected.shape == (int((batch["labels"][:, 1:] != -100).sum()),)
    assert_close(engine.forward(batch), expected)


def test_a_loss_of_the_users_own_averages_like_the_built_in(model, actor):
    """At the old policy -2 A log pi has twice the built-in's gradient, however the window is cut;
    a skipped step has none."""
    window = split_experience_batch(sampled(model))
    _, built_in = taken(actor, objective_of(), [sampled(model)])
    twice = objective_of(loss=lambda tokens: -2 * tokens.advantages * tokens.logps)
    step, found = taken(actor, twice, window)
    assert_close(found, 2 * built_in, rtol=1e-4, atol=1e-6)
    assert step.num_terms == 10
    twice.settings = replace(twice.settings, skip_threshold=0.5)
    _, found = taken(actor, twice, window)
    assert not found.any()
    with pytest.raises(ValueError, match="one loss for each token of a response"):
        taken(actor, objective_of(loss=lambda tokens: tokens.logps.mean()), window)


# Responses of older weights


def of_version(one, version: int, *, less: float = 0.0):
    """Sampled by weights of ``version`` that gave each action of row r a log-prob ``less`` (r + 1)
    below the policy's."""
    rows = torch.arange(1, len(one) + 1)[:, None]
    sampled = one.action_log_probs - less * rows
    return replace(one, sampled_log_probs=sampled, version=torch.full((len(one),), version))


def test_older_responses_weigh_by_their_truncated_ratio(model, actor):
    """Ratios e^(0.3 r) of rows 1 to 4, cut at 2: terms and gradient are those of advantages that
    are so much larger. The KL term has no weight."""
    one = sampled(model)
    weight = (0.3 * torch.arange(1, 5)).exp().clamp(max=2.0)
    assert weight[2] == 2.0 and weight[1] < 2.0
    larger = replace(one, advantages=one.advantages * weight[:, None])
    for settings in ({}, {"kl_coef": 0.5}, {"loss_agg": LossAggregation("seq-mean-token-mean")}):
        expected, gradient = taken(actor, objective_of(**settings), [larger])
        objective = objective_of(**settings)
        objective.version = 8
        step, found = taken(actor, objective, split_experience_batch(of_version(one, 4, less=0.3)))
        assert step.num_terms == expected.num_terms
        assert step.loss == pytest.approx(expected.loss, rel=1e-5)
        assert_close(found, gradient, rtol=1e-4, atol=1e-6)


def test_what_is_left_out_still_counts_in_the_divisor(model, actor):
    one = sampled(model)
    settings = {"correction": RolloutCorrection(keep=(0.5, 1.5)), "kl_coef": 0.5}
    objective = objective_of(**settings)
    objective.version = 8
    step, _ = taken(actor, objective, [of_version(one, 4, less=0.3)])
    ratio = math.exp(0.3)  # of the first row, the only one within the bounds
    kept = ratio * float(one.advantages[0][one.action_mask[0]].sum())
    k3 = math.exp(-0.2) - 1 + 0.2
    assert step.num_terms == 10
    assert step.loss == pytest.approx(-kept / 10 + 0.5 * k3, rel=1e-4)


def test_responses_of_the_version_that_is_updated_are_as_ever(model, actor):
    """To the bit, whatever another engine says of them; the entropy is that of the engine."""
    one = sampled(model, moved=0.1)
    expected, gradient = taken(actor, objective_of(kl_coef=0.3), [one])
    objective = objective_of(kl_coef=0.3)
    objective.version, objective.first_pass = 8, True
    step, found = taken(actor, objective, [of_version(one, 8, less=0.05)])
    assert torch.equal(found, gradient) and step.loss == expected.loss
    engine = of_version(one, 8, less=0.05).sampled_log_probs[one.action_mask]
    assert samples_of(step, "sampled_entropy").mean() == pytest.approx(-float(engine.mean()))
    assert "rollout_gap" not in step.metrics  # measured over the whole episode instead


def test_a_loss_of_the_users_own_is_weighed_too(model, actor):
    one = sampled(model)
    twice = {"loss": lambda tokens: -2 * tokens.advantages * tokens.logps}
    larger = replace(one, advantages=one.advantages * math.exp(0.3))
    _, gradient = taken(actor, objective_of(**twice), [larger.select([0])])
    objective = objective_of(**twice)
    objective.version = 8
    _, found = taken(actor, objective, [of_version(one, 4, less=0.3).select([0])])
    assert_close(found, gradient, rtol=1e-4, atol=1e-6)


def test_older_responses_without_log_probs_of_their_own_are_refused(model, actor):
    one = replace(sampled(model), version=torch.full((4,), 3))
    with pytest.raises(ValueError, match="--rollout_is: the rollout engine gave no log-probs"):
        taken(actor, objective_of(), [one])
    expected, gradient = taken(actor, objective_of(), [sampled(model)])
    step, found = taken(actor, objective_of(correction=RolloutCorrection("none")), [one])
    assert torch.equal(found, gradient) and step.loss == expected.loss


def test_a_policy_loss_keeps_its_own_clip_range_and_mean():
    plain = policy_settings("ppo", 0.1, kl_coef=0.3)
    assert plain == PolicySettings(SurrogateSettings("ppo", 0.1, 0.1), kl_coef=0.3)
    for mode in ("token-mean", "seq-mean-token-sum-norm"):
        gspo = policy_settings("gspo", 0.1, 0.28, LossAggregation(mode, 9))
        assert gspo.surrogate == SurrogateSettings("gspo", 3e-4, 4e-4)
        assert gspo.loss_agg == LossAggregation("seq-mean-token-mean", 9)
    dapo = policy_settings("ppo", 0.2, 0.28, LossAggregation("seq-mean-token-mean"))
    assert (dapo.surrogate.clip_high, dapo.loss_agg.mode) == (0.28, "seq-mean-token-mean")
    with pytest.raises(ValueError, match="unknown policy loss 'gsop'"):
        policy_settings("gsop", 0.2)
