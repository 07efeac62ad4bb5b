"""PPO, GRPO and online DPO learn what can be checked: two seeds of the ten that
examples/demo/prove_online.py runs."""

import importlib.util
import sys
from pathlib import Path

import pytest

from tests.distributed.spawn import run

DEMO = Path(__file__).parents[2] / "examples" / "demo"


def learn(algo: str, seeds: int) -> list[tuple[float, float]]:
    """In a process of its own: the share of the reward and the KL of each seed."""
    from coati.parallel.boost import prepare_colossalai
    from tests.distributed.spawn import join_group

    join_group()
    prepare_colossalai()
    proof = load()
    return [proof.result(proof.curve(algo, seed)) for seed in range(seeds)]


def load():
    spec = importlib.util.spec_from_file_location("prove_online", DEMO / "prove_online.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["prove_online"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["ppo", "grpo", "online_dpo"])
def test_it_learns(algo):
    (found,) = run(1, "tests.trainer.test_online_learning:learn", algo, 2, timeout=900)
    for share, kl in found:
        assert load().has_learned(share, kl), (share, kl)


def test_the_goal_is_no_easy_one():
    proof = load()
    episode = {"train/reward": 0.94 * proof.REWARD, "train/approx_kl": 1.0}
    assert not proof.has_learned(*proof.result([episode] * 10))
    assert not proof.has_learned(0.99, proof.KL_BOUND + 0.1)
    # What the best policy needs, and what a wasteful one has: a reward of 1 at a KL of a symbol
    # each.
    assert proof.KL_BOUND > proof.RESPONSE * 0.6931 and proof.KL_BOUND < proof.RESPONSE * 3.4657


def test_the_reward_is_worked_by_hand():
    proof = load()
    low, high = "3 15 0 1 2 3 4 5", "16 31 20 21 22 23 24 25"
    assert proof.right_half(["9 4", "4 9", "2"], [low, high, "0 1 2 3 16 17 18 19"]) == [
        5.0,
        5.0,
        2.5,
    ]
