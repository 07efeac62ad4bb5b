"""What the processes of test_resume_flags.py do: runs that go on from a checkpoint with other
flags, each to its first step, in one process."""

import contextlib
import hashlib
import io
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.end_to_end.worker import SCRIPTS, run_script


@dataclass(frozen=True)
class Attempt:
    """A run of ``script`` with ``words`` on a copy of ``base`` (None: from the start, to its
    end)."""

    script: str
    words: list[str]
    base: str | None = None


@dataclass
class Reached:
    """Exit code and standard error; ``seen``: what its first step was taken with, and the weights
    that it made; ``left``: whether its lock was still there at the end."""

    code: int
    err: str
    left: bool = False
    seen: dict[str, Any] = field(default_factory=dict)


class FirstStep(Exception):
    """The first step has been taken."""


def attempts(all: dict[str, Attempt]) -> dict[str, Reached]:
    """Each of them, one after the other."""
    with patch("coati.parallel.launch.shut_down"):
        return {name: attempt(each) for name, each in all.items()}


def attempt(each: Attempt) -> Reached:
    import torch.distributed as dist

    save_dir = each.words[each.words.index("--save_dir") + 1]
    first = os.environ.get("RANK", "0") == "0"
    if each.base is not None and first:
        shutil.copytree(each.base, save_dir)
    if dist.is_initialized():
        dist.barrier()
    found = Reached(0, "")
    text = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stderr(text))
        stack.enter_context(patch.object(sys, "argv", [str(SCRIPTS / each.script), *each.words]))
        if each.base is not None:
            stack.enter_context(stopped_after_the_first_step(found.seen))
        try:
            run_script(each.script)
        except FirstStep:
            found.code = 0
        except SystemExit as stop:
            found.code = stop.code or 0
    found.err = text.getvalue()
    found.left = (Path(save_dir) / "run.lock").exists()
    if dist.is_initialized():
        dist.barrier()
    if each.base is not None and first:
        shutil.rmtree(save_dir)
        shutil.rmtree(save_dir + "-new", ignore_errors=True)
    return found


@contextlib.contextmanager
def stopped_after_the_first_step(seen: dict[str, Any]) -> Iterator[None]:
    from coati.trainer.base import SLTrainer
    from coati.trainer.ilql import ILQLTrainer
    from coati.trainer.online import OLTrainer

    trained_step = SLTrainer._step
    online_step = OLTrainer._step
    episode = OLTrainer._run_episode

    def step(self, micro_batches, loader, *others):
        seen.update(of_trainer(self), rows=loader.rows_per_step, objective=numbers(self.objective))
        seen["reference"] = getattr(self.objective, "reference", None) is not None
        if isinstance(self, ILQLTrainer):
            seen.update(target_alpha=self.alpha, target_interval=self.sync_every)
        trained_step(self, micro_batches, loader, *others)
        seen.update(weights_of(self.engine))
        raise FirstStep

    def run_episode(self, prompts, evaluation, ptx, *others):
        seen.update(of_trainer(self), rows=prompts.rows_per_step)
        seen.update(of_rollouts(self))
        if ptx is not None:
            seen["ptx"] = (self.ptx_coef, ptx.rows_per_step)
        episode(self, prompts, evaluation, ptx, *others)

    def update(self, *others):
        seen["collected"] = len(self.buffer)
        online_step(self, *others)
        seen.update(weights_of(*self.models.values()))
        raise FirstStep

    with (
        patch.object(SLTrainer, "_step", step),
        patch.object(SLTrainer, "fit", telling_of(SLTrainer.fit, seen)),
        patch.object(OLTrainer, "run", telling_of(OLTrainer.run, seen)),
        patch.object(OLTrainer, "_run_episode", run_episode),
        patch.object(OLTrainer, "_step", update),
    ):
        yield


def telling_of(original: Any, seen: dict[str, Any]) -> Any:
    """A trainer's loop that tells of its evaluation batches."""

    def loop(self, train, evaluation=None, *others, **trackers):
        if evaluation is not None:
            seen["evaluation"] = (len(evaluation.dataset), evaluation.batch_size)
        return original(self, train, evaluation, *others, **trackers)

    return loop


def of_trainer(trainer: Any) -> dict[str, Any]:
    schedule = replace(trainer.schedule, save_dir=None)
    return of_engine(trainer.engine) | {"step": trainer.state.step, "schedule": str(schedule)}


def of_engine(engine: Any) -> dict[str, Any]:
    groups = engine.optimizer.param_groups
    return {
        "lr": [group["lr"] for group in groups],
        "decay": [group["weight_decay"] for group in groups],
        "betas": [group["betas"] for group in groups],
        "options": str(engine.options),
        "moments": len(engine.optimizer.optim.state),
    }


def of_rollouts(trainer: Any) -> dict[str, Any]:
    maker = trainer.maker
    functions = maker.scorer.functions
    found = {
        "policy": str(trainer.policy_objective.settings),
        "rollouts": f"{maker.settings} {getattr(maker.rollout, 'sampling', '')}",
        "kl": (maker.kl.kl_coef, maker.kl.target, maker.kl.horizon),
        "target": maker.kl.target,
        "horizon": maker.kl.horizon,
        "temperature": trainer.episodes.temperature(trainer.episode),
        "ahead": trainer.episodes.ahead,
        "refills": trainer.episodes.refill_rounds,
        "pass_at": trainer.pass_at and (trainer.pass_at.ks, trainer.pass_at.generations),
        "right": trainer.pass_at and str(trainer.pass_at.right),
        "buffer": (trainer.buffer.sample_batch_size, trainer.buffer.limit),
        "value": numbers(trainer.value_objective),
        "functions": 0 if functions is None else len(functions.weights),
        "timeout": None if functions is None else functions.timeout,
    }
    if hasattr(trainer.policy_objective, "objectives"):  # of pairs
        losses = trainer.policy_objective
        found["losses"] = f"{losses.objectives} ld_alpha={losses.row_logps.ld_alpha}"
        found["reference"] = maker.reference is not None
    if trainer.critic is not None:
        found["critic_lr"] = of_engine(trainer.critic)["lr"]
    return found


def numbers(objective: Any) -> str:
    """What an objective was made with, as text."""
    held = {name: value for name, value in vars(objective).items() if name != "reference"}
    return " ".join(f"{name}={value}" for name, value in held.items())


def weights_of(*engines: Any) -> dict[str, Any]:
    """All weights of this rank: a digest, and the mean size of each parameter."""
    digest = hashlib.sha256()
    sizes = []
    for parameter in (each for engine in engines for each in engine.module.parameters()):
        values = parameter.detach().float().cpu().contiguous()
        digest.update(values.numpy().tobytes())
        sizes.append(float(values.double().abs().mean()))
    return {"weights": digest.hexdigest(), "sizes": sizes}


def folder_of(place: Path, name: str) -> str:
    return str(place / "".join(c if c.isalnum() else "_" for c in name))
