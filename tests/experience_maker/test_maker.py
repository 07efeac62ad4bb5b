"""Experience of models that say what the test tells them: every number worked by hand."""

import json
import math
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from coati.experience_maker.kl_controller import KLController
from coati.experience_maker.maker import NaiveExperienceMaker
from coati.experience_maker.rollout_batch import ExperienceSettings
from coati.experience_maker.rollouts.pending_rollouts import PendingRollouts, RolloutsLost
from coati.experience_maker.scoring import Scorer
from coati.models.generation.loop import Generated
from tests.experience_maker.stubs import StubEngine, StubRollout, Words, log_probs, prompts

# Two answers to each prompt where there are groups; [.., 2] has stopped, the others were cut.
TWO = [[3, 2], [4]]
FOUR = [[3, 2], [4, 4, 4], [5, 2], [6]]


def scored(*values: float) -> Scorer:
    given = list(values)

    def say(batch: dict) -> torch.Tensor:
        rows = len(batch["input_ids"])
        mine, given[:rows] = given[:rows], []
        return torch.tensor(mine)

    return Scorer(StubEngine(say))


def position(batch: dict) -> torch.Tensor:
    """A tenth of the position: V of the state in which a token is chosen."""
    return torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"]) / 10


def make(
    answers,
    scorer,
    *,
    kl_coef=0.1,
    target=None,
    reference=-1.5,
    others=None,
    logprob=-1.0,
    **settings,
):
    """Actor log-probs are -1, the reference's -1.5: KL 0.5 an action."""
    settings = ExperienceSettings(
        **({"max_new_tokens": 3, "stop_sequences": [[2]], "whiten": False} | settings)
    )
    critic = StubEngine(position) if settings.method is None else None
    kl = KLController(kl_coef, target, 100)
    actor = StubEngine(log_probs(-0.25), others)
    toward = None if reference is None else StubEngine(log_probs(reference))
    return NaiveExperienceMaker(
        actor,
        StubRollout(answers, logprob),
        scorer,
        Words(),
        settings,
        reference=toward,
        critic=critic,
        kl=kl,
    )


def collect(maker: NaiveExperienceMaker, count: int):
    return maker.make_experience(maker.ask(prompts([5, 6], [7]), range(10, 10 + count), 3, 0.5))


PPO = {"lam": 1.0}


def test_ppo():
    maker = make(TWO, scored(2.0, 9.0), **PPO)
    found = collect(maker, 2)
    one = found.experience
    assert one.sequences.tolist() == [[5, 6, 3, 2], [8, 7, 4, 9]] and one.sample_index.tolist() == [
        10,
        11,
    ]
    assert one.action_mask.tolist() == [[True, True], [True, False]]
    assert_close(one.kl, torch.tensor([[0.5, 0.5], [0.5, 0.0]]))
    assert_close(
        one.values, torch.tensor([[0.1, 0.2], [0.0, 0.0]])
    )  # states 1 and 2 of the first row, 0 of the second
    # -0.1 x 0.5 for each action, the score at the last one, 9 cut to 5.
    assert_close(one.returns, torch.tensor([[1.9, 1.95], [4.95, 0.0]]))
    assert_close(one.advantages, torch.tensor([[1.8, 1.75], [4.95, 0.0]]))
    assert one.reward.tolist() == [2, 9] and one.reference_log_probs is None
    assert found.samples["approx_kl"].tolist() == [1.0, 0.5] and found.samples[
        "stop_rate"
    ].tolist() == [1, 0]
    assert found.samples["response_length"].tolist() == [2, 1]
    assert found.responses.prompts == ["5 6", "7"] and found.responses.responses == ["3", "4"]
    assert (
        maker.actor.temperature == maker.reference.temperature == 0.5
        and maker.rollout.temperatures == [0.5]
    )


def test_discount_and_lambda():
    one = collect(make(TWO, scored(2.0, 0.0), kl_coef=0.0, gamma=0.5, lam=0.5), 2).experience
    # delta: 0.5 x 0.2 - 0.1, 2 - 0.2;  A: 0 + 0.25 x 1.8, 1.8
    assert_close(one.advantages[0], torch.tensor([0.45, 1.8]))
    assert_close(one.returns[0], torch.tensor([0.55, 2.0]))


def test_without_a_reference_there_is_no_kl():
    found = collect(make(TWO, scored(2.0, 0.0), reference=None, **PPO), 2)
    assert not found.experience.kl.any() and found.samples["approx_kl"].tolist() == [0, 0]


def test_log_probs_that_the_rollout_does_not_give_are_the_actors():
    one = collect(make(TWO, scored(0.0, 0.0), logprob=None, **PPO), 2).experience
    assert_close(one.action_log_probs, torch.tensor([[-0.25, -0.25], [-0.25, 0.0]]))
    assert_close(one.kl, torch.tensor([[1.25, 1.25], [1.25, 0.0]]))


def test_penalties_then_normalization_then_clipping():
    # 4 and 12 - 2 - that one was cut - are 4 and 10: mean 7, spread sqrt 18, so +-0.7071, cut to
    # +-0.5.
    settings = {
        "missing_eos_penalty": 2.0,
        "reward_normalization": "running",
        "reward_clip": 0.5,
        "kl_coef": 0.0,
    }
    one = collect(make(TWO, scored(4.0, 12.0), **settings, **PPO), 2).experience
    assert_close(one.returns, torch.tensor([[-0.5, -0.5], [0.5, 0.0]]))
    settings["reward_clip"] = None
    one = collect(make(TWO, scored(4.0, 12.0), **settings, **PPO), 2).experience
    assert_close(one.returns[:, 0], torch.tensor([-3 / math.sqrt(18), 3 / math.sqrt(18)]))


def test_the_score_at_every_action():
    one = collect(
        make(TWO, scored(2.0, 0.0), kl_coef=0.0, reward_at="every_token", **PPO), 2
    ).experience
    assert_close(one.returns[0], torch.tensor([4.0, 2.0]))


def groups(method: str, *values: float, answers=FOUR, **settings):
    return collect(
        make(answers, scored(*values), method=method, num_generations=2, kl_in="loss", **settings),
        4,
    )


def test_grpo():
    found = groups("grpo", 1.0, 3.0, 5.0, 5.0)
    one, step = found.experience, 1 / (math.sqrt(2) + 1e-4)
    assert_close(one.advantages[:, 0], torch.tensor([-step, step, 0.0, 0.0]))
    assert_close(one.advantages[1], torch.full((3,), step))
    assert one.values is None and one.returns is None
    assert_close(one.reference_log_probs, torch.where(one.action_mask, -1.5, 0.0))
    assert (
        found.samples["equal_groups"].tolist() == [0, 0, 1, 1]
        and not found.samples["dropped"].any()
    )
    assert found.responses.prompts == ["5 6", "5 6", "7", "7"] and one.sample_index.tolist() == [
        10,
        11,
        12,
        13,
    ]


def test_truths_follow_their_prompts():
    maker = make(FOUR, scored(1.0, 3.0, 5.0, 5.0), method="grpo", num_generations=2)
    given = prompts([5, 6], [7], truths=["first", "second"])
    assert maker.make_experience(maker.ask(given, range(4), 0)).responses.gt_answers == [
        "first",
        "first",
        "second",
        "second",
    ]


def test_kl_as_part_of_the_reward():
    # KL 1 and 1.5 of the first two responses at 0.1: 1 - 0.1 and 3.1 - 0.15 differ by 2.05.
    maker = make(FOUR, scored(1.0, 3.1, 5.0, 5.0), method="dr_grpo", num_generations=2)
    one = collect(maker, 4).experience
    assert_close(one.advantages[:, 0], torch.tensor([-1.025, 1.025, -0.025, 0.025]))
    assert one.reference_log_probs is None


@pytest.mark.parametrize(
    "method, first", [("dr_grpo", -1.0), ("rloo", -2.0), ("reinforce_pp_baseline", -1.0)]
)
def test_other_ways_to_compare(method, first):
    one = groups(method, 1.0, 3.0, 5.0, 5.0).experience
    assert_close(one.advantages[:, 0], torch.tensor([first, -first, 0.0, 0.0]))


def test_reinforce_pp_compares_nothing():
    maker = make(TWO, scored(2.0, 4.0), method="reinforce_pp")
    found = collect(maker, 2)
    # -0.05 for each action, and the score: what is still to come.
    assert_close(found.experience.advantages, torch.tensor([[1.9, 1.95], [3.95, 0.0]]))
    assert "equal_groups" not in found.samples


def test_dapo_drops_equal_groups_and_punishes_length():
    found = groups("dapo", 1.0, 3.0, 5.0, 5.0, overlong_buffer_len=2)
    # Lengths 2, 3, 2, 1 of 3 with a margin of 2: -0.5, -1, -0.5, 0; so the second group is not
    # equal after all.
    half = 0.75 / (1.5 / math.sqrt(2) + 1e-4)
    assert_close(found.experience.advantages[:2, 0], torch.tensor([-half, half]))
    assert not found.samples["dropped"].any()
    found = groups("dapo", 1.0, 3.0, 5.0, 5.0)
    assert found.samples["dropped"].tolist() == [0, 0, 1, 1]
    assert found.experience.action_mask.any(1).tolist() == [True, True, False, False]
    assert found.experience.response_lengths().tolist() == [
        2,
        3,
        2,
        1,
    ]  # they are still what was answered


def test_truncated_responses_can_be_left_out():
    found = groups("grpo", 1.0, 3.0, 5.0, 6.0, mask_truncated_completions=True)
    assert found.samples["dropped"].tolist() == [0, 1, 0, 1]
    assert found.experience.action_mask.sum(1).tolist() == [2, 0, 2, 0]
    assert found.experience.advantages[0, 0] < 0  # compared with the ones that are left out


def test_many_rows_are_answered_in_parts():
    whole, parts = (
        groups("grpo", 1.0, 3.0, 5.0, 5.0, rollout_batch_size=size).experience for size in (None, 3)
    )
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, parts.tensors()[name]) or name == "sequences", name
    real = whole.attention_mask
    assert torch.equal(whole.sequences[real], parts.sequences[real])


@pytest.mark.parametrize("replaces", [False, True])
def test_an_engine_that_replaces_rows_is_asked_once(replaces):
    maker = make([*TWO, *TWO], scored(2.0, 4.0, 1.0, 3.0), rollout_batch_size=3, **PPO)
    maker.rollout.replaces_rows = replaces
    pending = maker.ask(prompts([5, 6], [7], [5, 6], [7]), range(4), 3, 0.5)
    assert [len(part.result().sequences) for part in pending.parts] == ([4] if replaces else [3, 1])
    assert getattr(maker.rollout, "rows_at_once", None) == (3 if replaces else None)


def test_a_phase_is_whitened_as_a_whole():
    maker = make([*TWO, *TWO], scored(2.0, 4.0, 1.0, 3.0), kl_coef=0.0, whiten=True, **PPO)
    collected = [collect(maker, 2), collect(maker, 2)]
    raw = torch.cat([each.experience.advantages[each.experience.action_mask] for each in collected])
    parts, figures = maker.finalize_advantages(collected)
    found = torch.cat([part.advantages[part.action_mask] for part in parts])
    assert_close(found, (raw - raw.mean()) / raw.std(), rtol=1e-4, atol=1e-5)
    assert figures["advantages_std"] == pytest.approx(float(raw.std()), rel=1e-5)
    assert figures["reward_std"] == pytest.approx(math.sqrt(5 / 3))
    returns, values = (
        torch.cat([getattr(e.experience, n)[e.experience.action_mask] for e in collected])
        for n in ("returns", "values")
    )
    explained = 1 - (returns - values).var() / returns.var()
    assert figures["explained_variance"] == pytest.approx(float(explained), rel=1e-4)
    # One phase that collects all four at once says the same.
    maker = make([*TWO, *TWO], scored(2.0, 4.0, 1.0, 3.0), kl_coef=0.0, whiten=True, **PPO)
    together = maker.make_experience(maker.ask(prompts([5, 6], [7], [5, 6], [7]), range(4), 3, 0.5))
    assert_close(
        maker.finalize_advantages([together])[0][0].advantages,
        torch.cat([part.advantages for part in parts]),
    )


def test_the_coefficient_moves_by_the_mean_kl_of_all_ranks():
    # Responses of KL 1 and 0.5 here, 4.5 of another rank: the mean is 2, twice the target.
    maker = make(TWO, scored(1.0, 1.0), target=1.0, others={2: [4.5, 1.0]}, **PPO)
    maker.finalize_advantages([collect(maker, 2)])
    assert maker.kl.kl_coef == pytest.approx(0.1 * (1 + 0.2 * 3 / 100), rel=1e-12)


def test_an_evaluation_changes_nothing():
    settings = {"target": 1.0, "reward_normalization": "running", **PPO}
    maker = make([*TWO, *TWO, *TWO], scored(1.0, 2.0, 7.0, 8.0, 3.0, 4.0), **settings)
    maker.finalize_advantages([collect(maker, 2)])
    before = maker.state_dict()
    judged = maker.rollout_and_score(prompts([5, 6], [7]), range(2), 9)
    assert judged.samples["reward"].tolist() == [7, 8] and maker.state_dict() == before
    other = make([*TWO, *TWO], scored(1.0, 2.0, 3.0, 4.0), **settings)
    other.finalize_advantages([collect(other, 2)])
    assert torch.equal(collect(other, 2).experience.returns, collect(maker, 2).experience.returns)


def test_state_goes_on_elsewhere():
    settings = {"target": 1.0, "reward_normalization": "running", **PPO}
    maker = make([*TWO, *TWO], scored(1.0, 2.0, 3.0, 4.0), **settings)
    maker.finalize_advantages([collect(maker, 2)])
    other = make(TWO, scored(3.0, 4.0), **settings)
    other.load_state_dict(maker.state_dict())
    assert torch.equal(collect(other, 2).experience.returns, collect(maker, 2).experience.returns)


def test_the_state_of_an_older_release():
    path = Path(__file__).parents[1] / "data" / "ppo_state_0.1.0.json"
    stored = json.loads(path.read_text())["maker"]
    maker = make(TWO, scored(3.0, 4.0), target=1.0, reward_normalization="running", **PPO)
    maker.load_state_dict(stored)
    state = maker.state_dict()
    assert state == {"kl": stored["kl"], "normalization": stored["normalisation"]}


def test_a_critic_and_a_group_method_exclude_each_other():
    for method, critic in ((None, None), ("grpo", StubEngine())):
        settings = ExperienceSettings(3, [[2]], method=method)
        with pytest.raises(ValueError, match="PPO takes a critic and no group method"):
            NaiveExperienceMaker(
                StubEngine(), StubRollout([]), scored(), Words(), settings, critic=critic
            )


def test_scores_of_a_group_are_clipped_where_that_is_asked_for():
    wide = collect(
        make(FOUR, scored(9.0, 1.0, 1.0, 0.0), method="rloo", num_generations=2, reward_clip=3.0), 4
    )
    # 9 counts as 3: each is judged by the other of its pair.
    assert_close(
        wide.experience.advantages[:, 0], torch.tensor([2.0, -2.0, 1.0, -1.0]) - wide_kl(wide)
    )


def wide_kl(found) -> torch.Tensor:
    """What the KL in the reward takes off each advantage: its own, less that of the other of its
    pair."""
    kl = 0.1 * found.samples["approx_kl"]
    return kl - kl.view(-1, 2).flip(1).flatten()


# Responses of other weights or of another engine


def asked_then_published(maker: NaiveExperienceMaker, version: int | None):
    """Responses that were asked for at version 4; then the policy is at ``version``."""
    maker.publish(4)
    pending = maker.ask(prompts([5, 6], [7]), range(10, 12), 3, 0.5)
    if version is not None:
        maker.publish(version)
    return maker.make_experience(pending).experience


def test_responses_of_older_weights_have_both_log_probs():
    """-1 by the weights that sampled, -0.25 by the policy as it is now, which the KL is of."""
    one = asked_then_published(make(TWO, scored(0.0, 0.0), **PPO), 12)
    assert_close(one.sampled_log_probs, torch.tensor([[-1.0, -1.0], [-1.0, 0.0]]))
    assert_close(one.action_log_probs, torch.tensor([[-0.25, -0.25], [-0.25, 0.0]]))
    assert_close(one.kl, torch.tensor([[1.25, 1.25], [1.25, 0.0]]))
    assert one.version.tolist() == [4, 4]


def test_the_kl_of_older_responses_is_weighed():
    """Two actions and one; each is e^0.75 times as likely by now, cut to 2; each KL is 1.25.
    That of an evaluation, whose weights are those of now, is as ever."""
    maker = make([*TWO, *TWO], scored(*[0.0] * 4), **PPO)
    maker.publish(4)
    pending = maker.ask(prompts([5, 6], [7]), range(2), 3, 0.5)
    maker.publish(12)
    found = maker.make_experience(pending)
    assert_close(found.samples["approx_kl"], torch.tensor([2 * 2 * 1.25, 2 * 1.25]))
    judged = maker.rollout_and_score(prompts([5, 6], [7]), range(2), 9)
    assert judged.samples["approx_kl"].tolist() == [1.0, 0.5]


def test_responses_of_the_weights_of_now_are_as_ever():
    one = asked_then_published(make(TWO, scored(0.0, 0.0), **PPO), None)
    assert_close(one.action_log_probs, torch.tensor([[-1.0, -1.0], [-1.0, 0.0]]))
    assert one.sampled_log_probs is None and one.version is None


@pytest.mark.parametrize("version", [4, 12])
def test_an_engines_own_log_probs_stand_beside_the_policys(version):
    maker = make(TWO, scored(0.0, 0.0), **PPO)
    maker.rollout.elsewhere = True
    one = asked_then_published(maker, version)
    assert_close(one.sampled_log_probs, torch.tensor([[-1.0, -1.0], [-1.0, 0.0]]))
    assert_close(one.action_log_probs, torch.tensor([[-0.25, -0.25], [-0.25, 0.0]]))
    assert one.version.tolist() == [4, 4]


def test_older_responses_without_log_probs_say_their_version():
    one = asked_then_published(make(TWO, scored(0.0, 0.0), logprob=None, **PPO), 12)
    assert one.sampled_log_probs is None and one.version.tolist() == [4, 4]


def test_what_was_asked_keeps_its_temperature():
    maker = make([*TWO, *TWO], scored(*[0.0] * 4), **PPO)
    first = maker.ask(prompts([5, 6], [7]), range(2), 3, 0.5)
    second = maker.ask(prompts([5, 6], [7]), range(2), 4, 0.9)
    assert maker.rollout.temperatures == [0.5, 0.9]
    for pending in (first, second):
        maker.make_experience(pending)
        assert maker.actor.temperature == maker.reference.temperature == pending.temperature


def test_responses_outlive_a_checkpoint(tmp_path):
    """As torch.save writes them and reads them without running code; the experience is the same to
    the bit."""
    maker = make(TWO, scored(2.0, 9.0), **PPO)
    maker.publish(4)
    given = prompts([5, 6], [7]) | {"gt_answer": ["a", None]}
    pending = maker.ask(given, range(10, 12), 3, 0.5)
    torch.save(pending.state_dict(), tmp_path / "it.pt")
    stored = torch.load(tmp_path / "it.pt", weights_only=True)
    other = make([], scored(2.0, 9.0), **PPO)
    other.publish(12)
    maker.publish(12)
    again = other.make_experience(PendingRollouts.of_state(stored, torch.device("cpu")))
    once = maker.make_experience(pending)
    assert again.responses == once.responses
    assert again.responses.gt_answers == ["a", None]
    for name, tensor in once.experience.tensors().items():
        assert torch.equal(tensor, again.experience.tensors()[name]), name


def test_parts_of_several_versions_are_no_batch():
    answers: list[Future] = [Future(), Future()]
    for version, answer in enumerate(answers):
        one = torch.zeros(1, 2, dtype=torch.long)
        answer.set_result(Generated(one, torch.ones(1), torch.ones(1), 1, version=version))
    with pytest.raises(ValueError, match="weights of {0, 1}, not of one"):
        PendingRollouts({}, [0, 1], 1, 1.0, answers).result()


@pytest.mark.parametrize(
    "error, kind", [(OSError("no route"), ValueError), (RolloutsLost("no server"), RolloutsLost)]
)
def test_an_engines_error_is_raised_where_it_is_waited_for(error, kind):
    maker = make(TWO, scored(0.0, 0.0), **PPO)
    pending = maker.ask(prompts([5, 6], [7]), range(2), 3, 0.5)
    failed: Future[Generated] = Future()
    failed.set_exception(error)
    pending.parts = [failed]
    with pytest.raises(kind, match=str(error)):
        maker.make_experience(pending)
