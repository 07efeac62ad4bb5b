"""What the processes of test_rl_models.py do: the models of PPO from a command line, a step of
each, what they say."""

from pathlib import Path
from typing import Any

import torch

from coati.parallel.objective import Objective

IDS = torch.tensor([[5, 9, 17, 30, 8, 12], [7, 40, 3, 11, 2, 2]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.masked_fill(MASK == 0, -100)}
TOTAL_STEPS = 20


class ToOne(Objective):
    """Draws the values of all real tokens to 1."""

    def num_terms(self, batch):
        return batch["attention_mask"].sum()

    def loss(self, outputs, batch):
        mask = batch["attention_mask"].bool()
        values = outputs[mask] if outputs.shape == mask.shape else outputs[0]
        return (values - 1).square().sum(), {}


def per_row(outputs: torch.Tensor, batch: dict) -> torch.Tensor:
    """The log-prob of each label, or the values or scores, in the order of the rows."""
    if outputs.shape == batch["input_ids"].shape:
        return outputs[batch["attention_mask"].bool()]
    return outputs.flatten()


def numbers(models: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What each model says of BATCH: log-probs (actor, reference), values of tokens (critic),
    scores (reward)."""
    from coati.parallel.inference_model import InferenceModel

    found = {}
    for name, model in models.items():
        batch = {
            key: value
            for key, value in BATCH.items()
            if key != "labels" or name in ("actor", "reference")
        }
        source = model if isinstance(model, InferenceModel) else InferenceModel(model)
        found[name] = source.forward_only(
            {key: value.to(source.engine.device) for key, value in batch.items()}, per_row
        )
        found[name] = found[name].detach().float().cpu()
    return found


def built(words: list[str], resume: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(models by name, what is saved beside their weights)."""
    from coati.cli.rollouts import parse_ppo
    from coati.models.tokenizer import load_tokenizer
    from coati.recipes import rl_models
    from coati.recipes.resume import Resume
    from coati.recipes.run import Run, join_processes

    settings = parse_ppo(words)
    options = join_processes(settings)
    tokenizer = load_tokenizer(settings.model.tokenizer)
    run = Run(settings, options, resume or Resume(), tokenizer, None)
    actor = rl_models.load_actor(run, TOTAL_STEPS)
    critic = rl_models.load_critic(run, actor, TOTAL_STEPS)
    models = {
        "actor": actor.engine,
        "critic": critic.engine,
        "reward": rl_models.load_reward_model(run, actor),
        "reference": rl_models.load_reference(run, actor),
    }
    assets = {"actor": actor.assets, "critic": critic.assets}
    return {name: model for name, model in models.items() if model}, assets


def train(models: dict[str, Any], steps: int = 2) -> None:
    from coati.trainer.policy_objective import PtxObjective

    for _ in range(steps):
        models["actor"].train_step([BATCH], PtxObjective())
        models["critic"].train_step([BATCH], ToOne())


def start_and_train(words: list[str], save_dir: str | None = None) -> dict[str, Any]:
    """Numbers at the start, after two steps, and (``save_dir``) after three, saved and built again
    in between."""
    from coati.parallel.checkpoint import RunningState, read_checkpoint, save_models
    from coati.recipes.resume import Resume

    models, assets = built(words)
    report = {
        "start": numbers(models),
        "rates": [g["lr"] for g in models["actor"].optimizer.param_groups],
    }
    report["critic_rates"] = [group["lr"] for group in models["critic"].optimizer.param_groups]
    report["shared"] = shared_tensors(models)
    train(models)
    report["trained"] = numbers(models)
    if save_dir is None:
        return report
    trained = {name: (models[name], assets[name]) for name in ("actor", "critic")}
    folder = save_models(save_dir, trained, RunningState(step=2))
    train(models, 1)
    report["on"] = numbers(models)
    state = read_checkpoint(folder)
    models, _ = built(
        words, Resume(weights=str(Path(folder) / "actor" / "modeling"), folder=folder, state=state)
    )
    report["resumed"] = numbers(models)
    train(models, 1)
    report["resumed_on"] = numbers(models)
    return report


def shared_tensors(models: dict[str, Any]) -> dict[str, float]:
    """Of each other model, the share of its numbers that lie in the memory of the actor's."""
    mine = {p.data_ptr() for p in models["actor"].module.parameters()}
    shares = {}
    for name in ("critic", "reward"):
        if name in models:
            model = models[name]
            module = getattr(model, "engine", model).module
            sizes = {p.data_ptr(): p.numel() for p in module.parameters()}
            shares[name] = sum(n for at, n in sizes.items() if at in mine) / sum(sizes.values())
    return shares
