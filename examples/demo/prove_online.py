"""Proof that PPO, GRPO and online DPO learn: a tiny random model, a verifiable reward, ten seeds.

``python examples/demo/prove_online.py ppo --seeds 10 --png ppo.png``. The prompt's last symbol
decides which half of the alphabet the response must come from; the reward is 5 x the share of such
symbols. A random policy gets 2.5; one that always picks from the right half has a KL of log 2 nats
per symbol to it. Each seed must reach 0.95 of the maximum reward, averaged over the last five
episodes, with at most 1.5 times that KL; the exit code says whether all did. Except for sizes and
learning rates, all settings are the defaults of train_ppo.py and train_grpo.py; online DPO has two
responses to each prompt, of which the better by that reward is chosen, and a beta of 0.5. With
``--ahead N`` the responses of an episode are sampled N episodes before they are trained on; of PPO
and GRPO ``--loss gspo`` takes another policy loss, with its own clip range and mean.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SYMBOLS = 32  # of the alphabet
RESPONSE = 8  # symbols
REWARD = 5.0  # at most
STEPS = 4  # optimizer steps of a pass
PASSES = 2  # over an episode's responses
GROUP = {"ppo": 1, "grpo": 8, "online_dpo": 2}  # responses to a prompt
EPISODES = {"ppo": 100, "grpo": 80, "online_dpo": 80}
RESPONSES = {"ppo": 128, "grpo": 256, "online_dpo": 256}  # of an episode
LR = {"ppo": 1e-3, "grpo": 1e-3, "online_dpo": 1e-3}
BETA = 0.5  # of online DPO: scores without noise want a larger one than those of people
LAST = 5  # episodes to average the result over
GOAL = 0.95  # of the reward
KL_BOUND = 1.5 * RESPONSE * math.log(2)


def right_half(prompts: list[str], responses: list[str], **_: Any) -> list[float]:
    """The reward: 5 x the share of symbols from the half that the prompt's last symbol names."""
    halves = [int(prompt.split()[-1]) % 2 for prompt in prompts]
    symbols = [[int(symbol) for symbol in response.split()] for response in responses]
    right = [
        sum(s // (SYMBOLS // 2) == half for s in response)
        for half, response in zip(halves, symbols, strict=True)
    ]
    return [REWARD * count / RESPONSE for count in right]


class Symbols:
    """Stands in for a tokenizer: numbers as text."""

    pad_token_id = eos_token_id = 0
    padding_side = "left"

    def decode(self, ids: Sequence[int], **_: bool) -> str:
        return " ".join(map(str, ids))


class Prompts(list):
    """Stands in for a data set: one to three symbols, then the one that decides."""

    column_names = ("input_ids",)

    def __init__(self) -> None:
        first = [[2 + (7 * i + j) % (SYMBOLS - 2) for j in range(1 + i % 3)] for i in range(256)]
        super().__init__(
            {"input_ids": [*row, 2 + i % (SYMBOLS - 2)]} for i, row in enumerate(first)
        )


def network(seed: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=SYMBOLS, max_position_embeddings=64, pad_token_id=0, **sizes)
    )


def policy_of(algo: str, rollout_is: str, loss: str) -> Any:
    """The settings of the policy's loss."""
    from coati.models.policy_loss import LossAggregation
    from coati.models.rollout_correction import RolloutCorrection
    from coati.trainer.boosted_rl import policy_settings

    mode = "token-mean" if algo == "ppo" else "seq-mean-token-mean"
    return policy_settings(
        loss,
        0.2,
        loss_agg=LossAggregation(mode),
        kl_coef=0.0 if algo == "ppo" else 0.04,
        correction=RolloutCorrection(rollout_is),
    )


def experience_of(algo: str, seed: int) -> Any:
    """How responses are sampled, and what becomes of their scores."""
    from coati.experience_maker import ExperienceSettings

    ppo = algo == "ppo"
    return ExperienceSettings(
        RESPONSE,
        [],
        method=None if ppo else algo,
        num_generations=GROUP[algo],
        kl_in="reward" if ppo else "loss",
        kl_estimator="k1" if ppo else "k3",
        seed=seed,
    )


def trainer(
    algo: str,
    seed: int,
    episodes: int,
    save_dir: str,
    ahead: int = 0,
    rollout_is: str = "token",
    loss: str = "ppo",
) -> Any:
    """A run of ``algo``, assembled by hand."""
    from coati.experience_buffer import NaiveExperienceBuffer
    from coati.experience_maker import (
        KLController,
        NaiveExperienceMaker,
        Scorer,
    )
    from coati.experience_maker.rollouts.rollout_engine import ModelRollout
    from coati.models import Critic
    from coati.models.generation.loop import Sampling
    from coati.parallel import ParallelOptions
    from coati.parallel.boost import boost
    from coati.parallel.inference_model import InferenceModel, boost_for_inference
    from coati.rewards.scorer import Rewards
    from coati.trainer import OLTrainer, RunSchedule
    from coati.trainer.monitor.rl_checks import RLChecks
    from coati.trainer.online import Episodes

    options = ParallelOptions(plugin="ddp", precision="fp32")
    training = {"weight_decay": 0.0, "total_steps": episodes * PASSES * STEPS}
    actor = boost(network(seed), options, lr=LR[algo], **training)
    ppo = algo == "ppo"
    critic = (
        boost(Critic(backbone=network(seed)), options, lr=LR[algo], **training) if ppo else None
    )
    maker = NaiveExperienceMaker(
        actor,
        ModelRollout(
            actor, sampling=Sampling(), stop_sequences=[], max_new_tokens=RESPONSE, pad_token_id=0
        ),
        Scorer(functions=Rewards([f"{__file__}:right_half"])),
        Symbols(),
        experience_of(algo, seed),
        reference=InferenceModel(boost_for_inference(network(seed), options)),
        critic=critic,
        kl=KLController(0.1 if ppo else 0.04),
    )
    parts = (actor, maker, NaiveExperienceBuffer(RESPONSES[algo] // STEPS))
    length = Episodes(episodes, PASSES, STEPS, seed=seed, sample_interval=0, ahead=ahead)
    return OLTrainer(
        *parts,
        length,
        critic=critic,
        policy=policy_of(algo, rollout_is, loss),
        schedule=RunSchedule(save_dir),
        checks=RLChecks(rollouts_ahead=ahead, rollout_is=rollout_is, fp32=True),
    )


def trainer_on_pairs(seed: int, episodes: int, save_dir: str, ahead: int) -> Any:
    """A run of online DPO, likewise."""
    from coati.experience_maker import ExperienceSettings, Scorer
    from coati.experience_maker.rollouts.rollout_engine import ModelRollout
    from coati.models.generation.loop import Sampling
    from coati.parallel import ParallelOptions
    from coati.parallel.boost import boost
    from coati.parallel.inference_model import InferenceModel, boost_for_inference
    from coati.rewards.scorer import Rewards
    from coati.trainer import OnlineDPOTrainer, RunSchedule
    from coati.trainer.monitor.pair_checks import PairChecks
    from coati.trainer.online import Episodes
    from coati.trainer.online_dpo import PairLossSettings, assemble_online_dpo

    algo = "online_dpo"
    options = ParallelOptions(plugin="ddp", precision="fp32")
    training = {"weight_decay": 0.0, "total_steps": episodes * PASSES * STEPS}
    actor = boost(network(seed), options, lr=LR[algo], **training)
    sampling = {"sampling": Sampling(), "stop_sequences": [], "max_new_tokens": RESPONSE}
    group = {"num_generations": GROUP[algo], "kl_in": "loss", "reward_clip": None}
    parts = assemble_online_dpo(
        ExperienceSettings(RESPONSE, [], **group, seed=seed),
        PairLossSettings(beta=[BETA]),
        actor=actor,
        reference=InferenceModel(boost_for_inference(network(seed), options)),
        rollout=ModelRollout(actor, **sampling, pad_token_id=0),
        scorer=Scorer(functions=Rewards([f"{__file__}:right_half"])),
        tokenizer=Symbols(),
        micro_batch_size=RESPONSES[algo] // GROUP[algo] // STEPS,
        episodes=Episodes(episodes, PASSES, STEPS, seed=seed, sample_interval=0, ahead=ahead),
    )
    checks = PairChecks(rollouts_ahead=ahead, fp32=True)
    return OnlineDPOTrainer(**parts, schedule=RunSchedule(save_dir), checks=checks)


def curve(
    algo: str,
    seed: int,
    episodes: int | None = None,
    ahead: int = 0,
    rollout_is: str = "token",
    loss: str = "ppo",
) -> list[dict[str, float]]:
    """The metrics of each episode of one run."""
    from coati.dataset import DataCollatorForPromptDataset
    from coati.dataset.load.loader import GlobalBatchLoader

    with tempfile.TemporaryDirectory() as folder:
        prompts = GlobalBatchLoader(
            Prompts(),
            DataCollatorForPromptDataset(Symbols(), 8),
            batch_size=RESPONSES[algo] // GROUP[algo],
            seed=seed,
        )
        episodes = episodes or EPISODES[algo]
        if algo == "online_dpo":
            trainer_on_pairs(seed, episodes, folder, ahead).run(prompts)
        else:
            trainer(algo, seed, episodes, folder, ahead, rollout_is, loss).run(prompts)
        lines = map(
            json.loads, (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        )
        return [line for line in lines if "train/reward" in line]


def result(lines: list[dict[str, float]]) -> tuple[float, float]:
    """``(share of the maximum reward, KL in nats)``, averaged over the last episodes."""
    last = lines[-LAST:]
    reward, kl = (
        sum(line[f"train/{name}"] for line in last) / len(last) for name in ("reward", "approx_kl")
    )
    return reward / REWARD, kl


def has_learned(share: float, kl: float) -> bool:
    return share >= GOAL and kl < KL_BOUND


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("algo", choices=tuple(LR))
    parser.add_argument("--loss", default="ppo", help="ppo, gspo, gspo-token, cispo or sapo")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--episodes", type=int, help=f"default: {EPISODES}")
    parser.add_argument("--ahead", type=int, default=0, help="episodes asked for ahead")
    parser.add_argument("--rollout_is", default="token", help="token, sequence or none")
    parser.add_argument("--png", type=Path, help="plot the curves of all seeds")
    args = parser.parse_args()
    if args.algo == "online_dpo" and (args.loss, args.rollout_is) != ("ppo", "token"):
        parser.error("--loss and --rollout_is are of the policy losses of ppo and grpo")
    from coati.parallel.boost import prepare_colossalai
    from coati.parallel.launch import launch

    launch(0)
    prepare_colossalai()
    curves = []
    learned = 0
    what = args.algo if args.loss == "ppo" else f"{args.algo} with {args.loss}"
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        started = time.perf_counter()
        curves.append(curve(args.algo, seed, args.episodes, args.ahead, args.rollout_is, args.loss))
        share, kl = result(curves[-1])
        learned += has_learned(share, kl)
        verdict = "learned" if has_learned(share, kl) else "NOT learned"
        seconds = time.perf_counter() - started
        print(
            f"{what} seed {seed}: {share:.3f} of the reward, KL {kl:.2f} nats; {verdict} "
            f"({seconds:.0f} s)"
        )
    print(
        f"{what}: {learned} of {args.seeds} seeds reach {GOAL} of the reward with a KL below "
        f"{KL_BOUND:.1f} nats"
    )
    if args.png is not None:
        from curves import draw

        panels = {
            "share of the reward": ("reward", REWARD, GOAL),
            "KL, nats per response": ("approx_kl", 1.0, KL_BOUND),
        }
        lines = {
            title: ([[line[f"train/{name}"] / scale for line in one] for one in curves], mark)
            for title, (name, scale, mark) in panels.items()
        }
        draw(lines, "episode", args.png)
        print(f"the curves are in {args.png}")
    sys.exit(learned < args.seeds)


if __name__ == "__main__":
    main()
