"""PPO and GRPO put together by hand around boosted models, with the keywords of the first
system."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from coati.models.rlvr_reward_model import RLVRRewardModel
from coati.trainer import GRPOTrainer, PPOTrainer
from coati.trainer.rl_assembly import linear_annealing
from tests.distributed.spawn import run

EPISODES, ROWS, LR = 30, 64, 1e-3


class Loader:
    """In a DataLoader's place: equal batches of left-padded prompts, and supervised rows where
    asked for."""

    batch_size = ROWS

    def __init__(self, proof: Any, labels: bool = False) -> None:
        self.rows = [row["input_ids"] for row in proof.Prompts()]
        self.labels = labels

    def __len__(self) -> int:
        return len(self.rows) // ROWS

    def __iter__(self):
        for start in range(0, len(self) * ROWS, ROWS):
            rows = self.rows[start : start + ROWS]
            width = max(map(len, rows))
            ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
            yield {"input_ids": ids, "attention_mask": mask} | (
                {"labels": ids} if self.labels else {}
            )


def boosted(model: Any) -> tuple:
    """Booster, model and optimizer as a notebook makes them."""
    from colossalai.booster import Booster
    from colossalai.booster.plugin import TorchDDPPlugin

    booster = Booster(plugin=TorchDDPPlugin(), mixed_precision=None)
    model, optimizer, *_ = booster.boost(model, torch.optim.Adam(model.parameters(), lr=LR))
    return booster, model, optimizer


def in_the_right_half(
    input_ids, attention_mask, response_start, response_end, gt_answer, **_
) -> float:
    """As prove_online's reward, from ids."""
    half = int(input_ids[response_start - 1]) % 2
    return 5 * float((input_ids[response_start:response_end] // 16 == half).float().mean())


def ppo(folder: str, **changes: Any) -> tuple[PPOTrainer, Any]:
    from coati.models import Critic
    from tests.trainer.test_online_learning import load

    proof = load()
    actor_booster, actor, actor_optim = boosted(proof.network(0))
    critic_booster, critic, critic_optim = boosted(Critic(backbone=proof.network(0)))
    keywords: dict[str, Any] = {
        "actor_booster": actor_booster,
        "critic_booster": critic_booster,
        "actor": actor,
        "critic": critic,
        "reward_model": RLVRRewardModel([in_the_right_half]),
        "initial_model": proof.network(0),
        "actor_optim": actor_optim,
        "critic_optim": critic_optim,
        "tokenizer": proof.Symbols(),
        "ptx_coef": 0.0,
        "train_batch_size": 16,
        "save_dir": folder,
        "max_new_tokens": 8,
        "stop_token_ids": [1, 1, 1],
    }
    return PPOTrainer(**keywords | changes), proof


def learns(folder: str) -> list[float]:
    """In a process of its own: the reward of each episode."""
    join()
    trainer, proof = ppo(folder)
    trainer.fit(EPISODES, 1, 2, Loader(proof))
    return of_episodes(folder, "train/reward")


def join() -> None:
    from coati.parallel.boost import prepare_colossalai
    from tests.distributed.spawn import join_group

    join_group()
    prepare_colossalai()


def of_episodes(folder: str, name: str) -> list[float]:
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [row[name] for row in map(json.loads, lines) if name in row]


def grouped(folder: str) -> list[float]:
    """GRPO of 4 episodes by another group method; the temperatures that it sampled at, and its
    rewards."""
    join()
    from coati.rewards import Rewards
    from tests.trainer.test_online_learning import load

    proof = load()
    booster, actor, optimizer = boosted(proof.network(0))
    config = {
        "start_temperature": 1.0,
        "end_temperature": 0.5,
        "annealing_warmup_steps": 1,
        "annealing_steps": 3,
    }
    trainer = GRPOTrainer(
        booster,
        actor,
        Rewards([f"{proof.__file__}:right_half"]),
        proof.network(0),
        optimizer,
        None,
        proof.Symbols(),
        kl_coef=0.01,
        ptx_coef=0.1,
        train_batch_size=128,
        num_generation=4,
        temperature_annealing_config=config,
        save_dir=folder,
        algo="rloo",
        policy_loss="cispo",
        entropy_coef=0.001,
        rollouts_ahead=1,
        max_new_tokens=8,
    )
    trainer.fit(4, 1, 1, Loader(proof), Loader(proof, labels=True))
    assert trainer.maker.settings.method == "rloo" and trainer.state.step == 8
    assert len(of_episodes(folder, "train/ptx_loss")) == 4
    assert trainer.policy_objective.settings.surrogate.name == "cispo"
    assert trainer.policy_objective.settings.loss_agg.mode == "token-mean"
    assert 2 < of_episodes(folder, "train/policy_entropy")[0] < 3.5  # log 32 is 3.47
    assert of_episodes(folder, "train/staleness") == [2, 2, 2]  # of two steps an episode
    return [trainer.episodes.temperature(episode) for episode in range(4)] + of_episodes(
        folder, "train/reward"
    )


def refusals(folder: str) -> list[str]:
    join()
    said = []
    for changes, calls in (
        ({"num_beams": 4}, ()),
        ({"max_new_tokens": None}, ()),
        ({"reward_model": len}, ()),
        ({"ptx_coef": 0.9}, (1, 1, 1)),
        ({"train_batch_size": 48}, (1, 1, 1)),
    ):
        try:
            trainer, proof = ppo(folder, **changes)
            trainer.fit(*calls, Loader(proof))
        except (TypeError, ValueError) as error:
            said.append(str(error))
    return said


def test_ppo_learns(tmp_path):
    (rewards,) = run(1, "tests.trainer.test_rl_keywords:learns", str(tmp_path), timeout=300)
    assert len(rewards) == EPISODES
    assert sum(rewards[:3]) / 3 < 2.9 and sum(rewards[-3:]) / 3 > 3.5, rewards


def test_grpo_with_group_method_annealing_and_ptx(tmp_path):
    (found,) = run(1, "tests.trainer.test_rl_keywords:grouped", str(tmp_path), timeout=300)
    assert found[:4] == [1.0, 1.0, 0.75, 0.5] and len(found) == 8


def test_what_is_wrong_is_said(tmp_path):
    (said,) = run(1, "tests.trainer.test_rl_keywords:refusals", str(tmp_path), timeout=300)
    parts = (
        "num_beams",
        "max_new_tokens is missing",
        "reward_model is builtin",
        "no pretrain_dataloader",
        "multiple",
    )
    for message, expected in zip(said, parts, strict=True):
        assert expected in message


def test_annealing_is_a_straight_line():
    temperature = linear_annealing(1.0, 0.6, 2, 4)
    assert [round(temperature(episode), 6) for episode in range(6)] == [
        1.0,
        1.0,
        1.0,
        0.8,
        0.6,
        0.6,
    ]
    assert pytest.approx(0.5) == linear_annealing(0.5, 0.5, 0, 1)(7)
