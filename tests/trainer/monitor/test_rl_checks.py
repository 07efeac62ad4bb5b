"""Diagnostics of an online run: silent on healthy noisy runs, loud and exact on
each simulated failure, exact on resume."""

import json
import math
import random

import pytest

from coati.trainer.monitor.episode_history import History, Trend
from coati.trainer.monitor.rl_checks import CHECKS, REMEMBERED, RLChecks

EPISODES = 200


def healthy(episode: int, dice: random.Random, critic: bool = True) -> dict[str, float]:
    """A run that learns: 32 responses an episode, so the mean's noise is a sixth of the scores'
    spread and more."""
    progress = 1 - math.exp(-episode / 70)
    metrics = {
        "reward": dice.gauss(0.2 + 1.5 * progress, 0.25),
        "reward_std": abs(dice.gauss(1.0, 0.15)),
        "approx_kl": dice.gauss(4 * progress, 0.15 + 0.5 * progress),
        "kl_coef": 0.05,
        "response_length": dice.gauss(60 + 40 * progress, 8),
        "distinct_2": min(1.0, dice.gauss(0.85 - 0.15 * progress, 0.04)),
        "sampled_entropy": max(0.01, dice.gauss(2.2 - 1.1 * progress, 0.15)),
        "stop_rate": min(1.0, dice.gauss(0.93, 0.05)),
        "rollout_gap": abs(dice.gauss(0.01, 0.01)),
        "skip_ratio": 0.0,
        "policy_loss": dice.gauss(0, 0.05),
    }
    if critic:
        # The first values of a new critic explain nothing; single episodes are far off later too.
        return metrics | {
            "value_loss": 0.3,
            "explained_variance": dice.gauss(0.6 * progress - 0.2 * 0.8**episode, 0.3),
        }
    return metrics | {"equal_groups": min(1.0, max(0.0, dice.gauss(0.3 + 0.3 * progress, 0.1)))}


def run(
    change=lambda metrics, episode, dice: None, seed: int = 0, episodes: int = EPISODES, **settings
):
    """(episode, text) of everything said about a healthy run that ``change`` spoils."""
    checks, dice, said = RLChecks(**settings), random.Random(seed), []
    for episode in range(episodes):
        metrics = healthy(episode, dice)
        change(metrics, episode, dice)
        said += [(episode, text) for text in checks.check(metrics, episode)]
    return said


@pytest.mark.parametrize("critic", [True, False], ids=["ppo", "grpo"])
@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_noisy_run_is_left_in_peace(seed, critic):
    checks, dice = RLChecks(), random.Random(seed)
    said = [
        text
        for episode in range(EPISODES)
        for text in checks.check(healthy(episode, dice, critic), episode)
    ]
    assert said == []


@pytest.mark.parametrize("seed", range(5))
def test_of_a_task_that_gets_solved_nothing_is_said_but_that(seed):
    checks, dice, said = RLChecks(reward_clip=None), random.Random(seed), []
    for episode in range(EPISODES):
        right = 1 / (
            1 + math.exp((60 - episode) / 8)
        )  # the share of right answers, 10 each, among 64
        spread = 10 * math.sqrt(right * (1 - right))
        metrics = healthy(episode, dice, critic=False) | {
            "reward": 10.0
            if episode > 140
            else min(10.0, max(0.0, dice.gauss(10 * right, spread / 8))),
            "reward_std": 0.0 if episode > 140 else spread,
            "equal_groups": max(right, 1 - right) ** 8 if episode <= 140 else 1.0,
        }
        said += checks.check(metrics, episode)
    assert 1 <= len(said) <= 2 and all("score alike" in text for text in said)


def put(**values):
    """A change that sets metrics: numbers, or functions of (episode, dice)."""

    def change(metrics, episode, dice):
        for name, value in values.items():
            metrics[name] = value(episode, dice) if callable(value) else value

    return change


FAILURES = {
    "flat": (put(reward=lambda e, d: d.gauss(0.2, 0.25)), "has not risen", "--lr", 90),
    "falls from the start": (
        put(reward=lambda e, d: d.gauss(-0.01 * e, 0.25)),
        "has not risen",
        "--kl_coef",
        60,
    ),
    "never moves": (
        put(reward=lambda e, d: d.gauss(0.2, 0.1), approx_kl=lambda e, d: d.gauss(0.001, 0.001)),
        "hardly moved",
        "raise --lr",
        90,
    ),
    "penalty outweighs": (
        put(reward=lambda e, d: d.gauss(0.2, 0.1), kl_coef=1.0),
        "outweighs",
        "lower --kl_coef",
        90,
    ),
    "collapse after a rise": (
        lambda m, e, d: m.update(reward=m["reward"] - (1.5 if e > 150 else 0)),
        "had risen from",
        "--num_update_steps",
        170,
    ),
    "answers repeat themselves": (
        lambda m, e, d: m.update(distinct_2=max(0.03, m["distinct_2"] - 0.01 * e)),
        "distinct_2 fell",
        "--ptx_coef between 0 and 1",
        60,
    ),
    "negative KL": (
        put(approx_kl=lambda e, d: d.gauss(-0.05 * e, 0.3)),
        "is negative",
        "--top_k",
        30,
    ),
    "KL runs away": (put(approx_kl=lambda e, d: math.exp(e / 15)), "diverging", "--kl_target", 70),
    "entropy collapses": (
        lambda m, e, d: m.update(sampled_entropy=2.2 * 0.96**e),
        "entropy fell",
        "--clip_eps_high",
        60,
    ),
    "equal groups": (
        put(equal_groups=lambda e, d: d.choice([1.0, 0.97])),
        "score alike",
        "--num_generations",
        12,
    ),
    "equal scores": (
        put(reward=0.0, reward_std=0.0),
        "all responses score alike",
        "neither too easy",
        12,
    ),
    "not centered": (
        lambda m, e, d: m.update(reward=m["reward"] - 4, reward_std=0.4),
        "not centered",
        "--center_coef",
        12,
    ),
    "beyond the clip": (
        lambda m, e, d: m.update(reward=m["reward"] + 20),
        "beyond --reward_clip 5",
        "running",
        12,
    ),
    "cut": (put(stop_rate=lambda e, d: d.uniform(0.4, 0.7)), "are truncated", "--max_seq_len", 12),
    "useless critic": (
        put(explained_variance=lambda e, d: d.gauss(-0.5, 0.3)),
        "explained variance",
        "--critic_lr",
        35,
    ),
    "rollout disagrees": (
        put(rollout_gap=lambda e, d: d.uniform(0.15, 0.5)),
        "disagree",
        "--rollout_engine model",
        4,
    ),
    "older responses without weights": (
        put(staleness_gap=lambda e, d: d.uniform(0.32, 0.5), update_kl=0.02),
        "--rollout_is none does not correct",
        "--rollout_is token",
        4,
        {"rollouts_ahead": 4, "rollout_is": "none"},
    ),
    "responses too old": (
        put(rollout_is_ess=lambda e, d: d.uniform(0.2, 0.45)),
        "by their importance weights they are worth",
        "--rollouts_ahead",
        4,
        {"rollouts_ahead": 2},
    ),
    "another temperature": (
        # Staleness explains 2 x sqrt(6 x 0.001) = 0.15 of it
        put(staleness_gap=lambda e, d: d.uniform(0.6, 0.9), update_kl=0.001),
        "explain about 0.15",
        "temperature",
        6,
        {"rollouts_ahead": 2},
    ),
    "a first episode that disagrees": (
        lambda m, e, d: m.pop("rollout_gap") and e == 0 and m.update(rollout_gap=0.3),
        "although both are of the same weights",
        "precision",
        1,
        {"rollouts_ahead": 1},
    ),
    "an engine of lower precision": (
        put(rollout_gap=lambda e, d: d.uniform(0.03, 0.06)),
        "disagree",
        "--mixed_precision",
        4,
        {"fp32": True},
    ),
    "skipped": (
        put(skip_ratio=lambda e, d: 0.25 if e == 40 else 0.0),
        "were skipped",
        "--skip_threshold",
        41,
    ),
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("failure", FAILURES)
def test_each_failure_is_named_in_time_and_once(failure, seed):
    change, words, flag, within, *settings = FAILURES[failure]
    found = run(change, seed, **dict(*settings))
    said = [(episode, text) for episode, text in found if words in text]
    assert said, f"nothing about {words!r}"
    assert said[0][0] < within and flag in said[0][1] and said[0][1].startswith("warning: ")
    # Repeated only where it became three times as bad, so a handful of times however long the run.
    assert len(said) <= 10


@pytest.mark.parametrize(
    "failure", ["equal groups", "not centered", "cut", "useless critic", "skipped", "equal scores"]
)
def test_what_does_not_get_worse_is_said_once(failure):
    change, words, _, _ = FAILURES[failure]
    assert len([text for _, text in run(change) if words in text]) == 1


def test_what_gets_three_times_as_bad_is_said_again():
    said = run(put(skip_ratio=lambda e, d: {10: 0.1, 11: 0.25, 12: 0.31, 13: 0.1}.get(e, 0.0)))
    assert [episode for episode, _ in said] == [10, 12]


def test_the_advice_knows_the_flags_of_the_run():
    change = FAILURES["negative KL"][0]
    text = run(change, top_k=50, top_p=1.0, repetition_penalty=1.2)[0][1]
    assert (
        "with --top_k 50 and --repetition_penalty 1.2: switch that off" in text
        and "--top_p" not in text
    )
    assert "(--max_seq_len 128)" in run(FAILURES["cut"][0], max_new_tokens=128)[0][1]
    degenerate = FAILURES["answers repeat themselves"][0]
    assert any("Raise --ptx_coef (below 1)" in text for _, text in run(degenerate, ptx_coef=0.2))
    assert not run(FAILURES["beyond the clip"][0], reward_normalization="running")
    low = put(approx_kl=lambda e, d: d.gauss(0.1 * e, 0.1))
    assert not run(low) and any("above 6." in text for _, text in run(low, kl_target=2.0))


def test_without_a_reference_nothing_is_said_about_kl():
    flat = put(reward=lambda e, d: d.gauss(0.2, 0.1), approx_kl=0.0, kl_coef=0.0)
    [(_, text)] = run(flat)
    assert "has not risen" in text and "KL" not in text and "raise --lr" in text


def test_a_setting_that_does_not_exist_is_refused():
    with pytest.raises(TypeError, match="patiense"):
        RLChecks(patiense=3)


@pytest.mark.parametrize("failure", FAILURES)
def test_a_resumed_run_says_what_the_uninterrupted_one_would(failure):
    change, expected = FAILURES[failure][0], run(FAILURES[failure][0], seed=3)
    checks, dice, said = RLChecks(), random.Random(3), []
    for episode in range(EPISODES):
        if episode % 7 == 5:  # stopped, and gone on with what a checkpoint holds
            state = json.loads(json.dumps(checks.state_dict(), allow_nan=False))
            checks = RLChecks()
            checks.load_state_dict(state)
        metrics = healthy(episode, dice)
        change(metrics, episode, dice)
        said += [(episode, text) for text in checks.check(metrics, episode)]
    assert said == expected


def test_numbers_that_are_not_finite_and_metrics_that_are_missing_do_no_harm():
    checks = RLChecks()
    for episode in range(60):
        values = {name: (math.nan, math.inf, -math.inf)[episode % 3] for name in REMEMBERED}
        assert checks.check(values if episode % 2 else {}, episode) == []


def test_every_check_reads_only_what_is_remembered():
    """A typing error in a name would otherwise be a check that never fires."""
    import inspect
    import re

    for check in CHECKS.values():
        names = re.findall(
            r'(?:late|early|before|middle|noise|_fall)\((?:history, )?"(\w+)"',
            inspect.getsource(check),
        )
        assert set(names) <= set(REMEMBERED)


def test_explained_variance_does_not_count_once_scores_are_alike():
    def solved(metrics, episode, dice):
        if episode > 60:
            metrics |= {"reward_std": 0.01, "explained_variance": -20.0}

    assert not [text for _, text in run(solved) if "explained variance" in text]


def test_windows_by_hand():
    history = History(("reward",), window=2)
    for episode, value in enumerate([1.0, math.nan, 3.0, 5.0, 9.0]):
        history.add({"reward": value}, episode)
    assert (
        history.early("reward") == 2.0
        and history.late("reward") == 7.0
        and history.before("reward") == 2.0
    )
    assert (
        history.best == 7.0
        and history.middle("reward", 3) == 5.0
        and history.middle("reward", 5) is None
    )
    assert history.noise("reward") == pytest.approx(math.sqrt((4 + 4 + 16) / 3 / 2))


def test_the_trend_is_that_of_least_squares():
    trend, points = Trend(), [(2, 1.0), (3, 2.0), (5, 2.0), (8, 4.0)]
    for x, y in points:
        trend.add(x, y)
    # By hand: means 4.5 and 2.25, sum of squares of x 21, of products 9.5, of y 4.75; rest 4.75 -
    # 9.5^2 / 21.
    rise, error = trend.rise()
    assert trend.span == 6 and rise == pytest.approx(6 * 9.5 / 21)
    assert error == pytest.approx(6 * math.sqrt((4.75 - 9.5**2 / 21) / 2 / 21))
    assert Trend().rise() == (0.0, math.inf)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ahead", [1, 2, 4])
def test_healthy_staleness_is_left_in_peace(ahead, seed):
    """As measured with examples/demo/prove_online.py: a gap of at most 0.8 x sqrt(6 update_kl) for
    each episode ahead, and weights that are worth 0.85 and more."""

    def older(metrics, episode, dice):
        del metrics["rollout_gap"]
        moved = abs(dice.gauss(0.01, 0.006))
        metrics |= {
            "update_kl": moved,
            "staleness_gap": ahead * 0.8 * math.sqrt(6 * moved) * dice.uniform(0.3, 1.0),
            "rollout_is_ess": dice.uniform(0.85, 1.0),
        }

    assert not run(older, seed, rollouts_ahead=ahead)
