"""What the process of test_resume_flags.py does: runs that go on from a checkpoint with other
flags, each to its first step, in one process."""

import contextlib
import io
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
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
    """Exit code and standard error; ``seen``: what its first step was taken with; ``left``: whether
    its lock was still there at the end."""

    code: int
    err: str
    left: bool = False
    seen: dict[str, Any] = field(default_factory=dict)


class FirstStep(Exception):
    """The first step is about to be taken."""


def attempts(all: dict[str, Attempt]) -> dict[str, Reached]:
    """Each of them, one after the other."""
    with patch("coati.parallel.launch.shut_down"):
        return {name: attempt(each) for name, each in all.items()}


def attempt(each: Attempt) -> Reached:
    save_dir = each.words[each.words.index("--save_dir") + 1]
    if each.base is not None:
        shutil.copytree(each.base, save_dir)
    found = Reached(0, "")
    text = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stderr(text))
        stack.enter_context(patch.object(sys, "argv", [str(SCRIPTS / each.script), *each.words]))
        if each.base is not None:
            stack.enter_context(stopped_at_the_first_step(found.seen))
        try:
            run_script(each.script)
        except FirstStep:
            found.code = 0
        except SystemExit as stop:
            found.code = stop.code or 0
    found.err = text.getvalue()
    found.left = (Path(save_dir) / "run.lock").exists()
    if each.base is not None:
        shutil.rmtree(save_dir)
    return found


@contextlib.contextmanager
def stopped_at_the_first_step(seen: dict[str, Any]) -> Iterator[None]:
    from coati.trainer.base import SLTrainer
    from coati.trainer.online import OLTrainer

    def step(self, micro_batches, loader, *_):
        seen.update(of_engine(self.engine), step=self.state.step, rows=loader.rows_per_step)
        seen["objective"] = numbers(self.objective)
        raise FirstStep

    def episode(self, prompts, *_):
        seen.update(of_engine(self.engine), step=self.state.step, rows=prompts.rows_per_step)
        if self.critic is not None:
            seen["critic_lr"] = of_engine(self.critic)["lr"]
        seen["objective"] = str(self.policy_objective.settings)
        seen["rollouts"] = f"{self.maker.settings} {getattr(self.maker.rollout, 'sampling', '')}"
        seen["kl"] = (self.maker.kl.kl_coef, self.maker.kl.target, self.maker.kl.horizon)
        seen["temperature"] = self.episodes.temperature(self.episode)
        seen["value"] = numbers(self.value_objective)
        raise FirstStep

    with (
        patch.object(SLTrainer, "_step", step),
        patch.object(OLTrainer, "_run_episode", episode),
    ):
        yield


def of_engine(engine: Any) -> dict[str, Any]:
    groups = engine.optimizer.param_groups
    return {
        "lr": [group["lr"] for group in groups],
        "decay": [group["weight_decay"] for group in groups],
        "betas": [group["betas"] for group in groups],
        "clip": engine.options.max_norm,
        "plugin": engine.options.plugin,
        "moments": len(engine.optimizer.optim.state),
    }


def numbers(objective: Any) -> str:
    """What an objective was made with, as text."""
    held = {name: value for name, value in vars(objective).items() if name != "reference"}
    return " ".join(f"{name}={value}" for name, value in held.items())


def folder_of(place: Path, name: str) -> str:
    return str(place / name.replace(" ", "_").replace("/", "_"))
