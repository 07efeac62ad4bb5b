"""Episodes of PPO or GRPO by this library; a worker process of bench_ppo_peers.py.

    python benchmarks/online_ways.py ppo|grpo FOLDER EPISODES PASSES

FOLDER is what online_case.prepare made. An episode is run for each line on standard input, and
printed as a line of JSON: its seconds, and those of rollout, scoring and update.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import online_case as case  # noqa: E402
from benchmarks import sft_case  # noqa: E402
from benchmarks.preference_ways import Rows  # noqa: E402

PHASES = ("rollout", "scoring", "update")


def at_once() -> None:
    """Waits for nothing."""


def show(found: dict[str, float]) -> None:
    print(json.dumps(found), flush=True)


class Paced:
    """A loader that gives out the prompts of an episode once ``wait`` is over; and, in the place of
    signs of trouble,
    the end of each episode: ``tell`` is given what it took."""

    def __init__(
        self, loader: Any, wait: Callable[[], Any] = at_once, tell: Callable[[dict], Any] = show
    ):
        self.loader = loader
        self.rows_per_step = loader.rows_per_step
        self.clock = case.Clock()
        self.wait = wait
        self.tell = tell

    def count(self, epoch: int) -> int:
        return self.loader.count(epoch)

    def global_batches(self, epoch: int, start: int) -> Iterator[Any]:
        self.wait()
        self.clock.start()
        return self.loader.global_batches(epoch, start)

    def check(self, metrics: dict[str, float], episode: int) -> list[str]:
        found = self.clock.read()
        phases = {phase: metrics[f"seconds_{phase}"] for phase in PHASES}
        self.tell(
            {
                **found,
                **phases,
                "answer_tokens": metrics["response_length"],
                "reward": metrics["reward"],
            }
        )
        return []

    def state_dict(self) -> dict:
        return {}


def loader(prompts: list[list[int]], tokenizer: Any) -> Any:
    """All of ``prompts`` in every episode."""
    from coati.dataset import DataCollatorForPromptDataset
    from coati.dataset.load.loader import GlobalBatchLoader

    rows = Rows({"input_ids": ids, "seq_length": len(ids)} for ids in prompts)
    collate = DataCollatorForPromptDataset(tokenizer, max(map(len, prompts)))
    return GlobalBatchLoader(rows, collate, batch_size=len(prompts), shuffle=False)


class Models(NamedTuple):
    """The roles as engines; GRPO has a policy alone."""

    policy: Any
    critic: Any = None
    reward: Any = None
    reference: Any = None


def boosted(
    options: Any, policy: Any, critic: Any = None, reward: Any = None, reference: Any = None
) -> Models:
    """Of models with or without the other three roles."""
    from coati.parallel.boost import boost
    from coati.parallel.inference_model import InferenceModel, boost_for_inference

    # A schedule so long that its learning rate stays where it starts.
    keywords = {
        "lr": case.LEARNING_RATE,
        "weight_decay": 0.0,
        "warmup_steps": 0,
        "total_steps": 10**9,
    }
    if critic is None:
        return Models(boost(policy, options, **keywords))
    frozen = (InferenceModel(boost_for_inference(model, options)) for model in (reward, reference))
    return Models(boost(policy, options, **keywords), boost(critic, options, **keywords), *frozen)


def stored(algorithm: str, folder: Path, options: Any) -> Models:
    """The models that online_case.prepare wrote."""
    from coati.models import Critic, RewardModel, load_causal_lm, load_scalar_model

    policy, reference = (load_causal_lm(str(folder / "model"), dtype="fp32") for _ in range(2))
    if algorithm == "grpo":
        return boosted(options, policy)
    critic, reward = (
        load_scalar_model(kind, str(folder / "reward"), dtype="fp32")
        for kind in (Critic, RewardModel)
    )
    return boosted(options, policy, critic, reward, reference)


def make_trainer(models: Models, size: case.Size, episodes: int, checks: Any, tokenizer: Any):
    """A PPO trainer, or without a critic one of GRPO, of ``episodes`` episodes whose end ``checks``
    is told."""
    from coati.experience_buffer import NaiveExperienceBuffer
    from coati.experience_maker.kl_controller import KLController
    from coati.experience_maker.maker import NaiveExperienceMaker
    from coati.experience_maker.rollout_batch import ExperienceSettings
    from coati.experience_maker.rollouts.rollout_engine import ModelRollout
    from coati.experience_maker.scoring import Scorer
    from coati.models.generation.loop import Sampling
    from coati.models.policy_loss import LossAggregation
    from coati.models.surrogate_loss import SurrogateSettings
    from coati.rewards import Rewards
    from coati.trainer import OLTrainer
    from coati.trainer.online import Episodes
    from coati.trainer.policy_objective import PolicySettings
    from coati.trainer.schedule import RunSchedule

    ppo = models.critic is not None
    answers = {"stop_sequences": [[tokenizer.eos_token_id]], "max_new_tokens": size.new}
    rollout = ModelRollout(
        models.policy, sampling=Sampling(), pad_token_id=tokenizer.pad_token_id, **answers
    )
    settings = ExperienceSettings(
        **answers, method=None if ppo else "grpo", num_generations=size.generations, lam=0.95
    )
    functions = None if ppo else Rewards([f"{case.__file__}:score"])
    maker = NaiveExperienceMaker(
        models.policy,
        rollout,
        Scorer(models.reward, functions),
        tokenizer,
        settings,
        reference=models.reference,
        critic=models.critic,
        kl=KLController(case.KL if ppo else 0.0),
    )
    loss_agg = LossAggregation("token-mean" if ppo else "seq-mean-token-mean", size.new)
    keywords: dict[str, Any] = {"critic": models.critic} if ppo else {}
    return OLTrainer(
        models.policy,
        maker,
        NaiveExperienceBuffer(size.answers),
        Episodes(episodes, size.passes, 1, lambda episode: case.TEMPERATURE, sample_interval=0),
        policy=PolicySettings(
            SurrogateSettings(clip_low=case.CLIP, clip_high=case.CLIP), loss_agg=loss_agg
        ),
        schedule=RunSchedule(log_interval=1),
        checks=checks,
        **keywords,
    )


def main() -> None:
    algorithm = sys.argv[1]
    folder = Path(sys.argv[2])
    episodes = int(sys.argv[3])
    size = replace(case.SIZES[algorithm], passes=int(sys.argv[4]))
    from coati.models import load_tokenizer
    from coati.parallel.launch import launch
    from coati.parallel.plugins import ParallelOptions
    from coati.utils.memory import peak_memory_mb

    launch()
    tokenizer = load_tokenizer(str(folder / "model"))
    rows = loader([row["input_ids"] for row in case.read(folder, size)], tokenizer)
    prompts = Paced(rows, sft_case.wait_for_turn)
    options = ParallelOptions(plugin="ddp", precision="fp32", grad_clip=case.MAX_NORM)
    trainer = make_trainer(stored(algorithm, folder, options), size, episodes, prompts, tokenizer)
    print("ready", flush=True)
    trainer.run(prompts)
    print(json.dumps({"peak_mb": peak_memory_mb()}), flush=True)


if __name__ == "__main__":
    main()
