"""The environment of a PPO or GRPO run, from its flags."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from coati.cli.online_settings import OnlineSettings
from coati.dataset.types.prompt_rows import DIALOGUE
from coati.environments.environment_table import ENVIRONMENTS, environment_arguments
from coati.environments.named_environment import environment_factory
from coati.environments.turn_tokens import TurnTokens
from coati.experience_maker.rollouts.dialogue_rollout import EnvironmentRollout, TurnLimits
from coati.experience_maker.rollouts.rollout_engine import RolloutEngine
from coati.recipes.build import Trained
from coati.recipes.run import PreparedRows, Run
from coati.utils.distributed import raise_together


@dataclass(frozen=True)
class NamedEnvironment:
    """``make`` makes one for a sample; ``tools`` are those of every one."""

    name: str
    make: Callable[[], Any]
    tools: list[dict[str, Any]]


def environment_of(run: Run[OnlineSettings]) -> NamedEnvironment | None:
    """What ``--environment`` names; from here on prompts are prepared for it. Every rank must call
    it. Raises ValueError on every rank for what cannot be made on one, and for a template that
    cannot be used with its tools."""
    settings = run.settings.rollout
    name = settings.environment
    if name is None or run.template is None:
        return None
    arguments = environment_arguments(name, settings.environment_args)
    make = raise_together(lambda: environment_factory(name, arguments))
    tools = list(getattr(make(), "tools", ()) or ())
    TurnTokens(run.template, []).check_tools(tools)
    options = replace(run.template.options, for_environment=json.dumps(tools))
    run.template.options = options
    return NamedEnvironment(name, make, tools)


def environment_rollout(
    run: Run[OnlineSettings],
    environment: NamedEnvironment | None,
    actor: Trained,
    rollout: RolloutEngine,
    stops: list[list[int]],
) -> EnvironmentRollout | None:
    """What asks ``rollout`` turn by turn; ``stops`` end a response."""
    if environment is None:
        return None
    settings = run.settings.rollout
    limits = TurnLimits(
        turns=settings.max_turns or 1,
        tokens=settings.max_seq_len,
        prompt=run.settings.data.longest_prompt,
        seconds=run.settings.reward.reward_timeout or None,
    )
    return EnvironmentRollout(
        actor.engine,
        rollout,
        environment.make,
        TurnTokens(run.template, stops),
        limits,
        pad_token_id=run.tokenizer.pad_token_id,
        name=f"--environment {environment.name}",
    )


def check_dialogues(
    run: Run[OnlineSettings], prompts: PreparedRows | None, flag: str = "prompt_dataset"
) -> None:
    """Raise ValueError for prompts that a run's environment cannot begin with, and, where nothing
    else gives a reward, for those that a built-in one cannot judge."""
    settings = run.settings
    name = settings.rollout.environment
    if name is None or prompts is None:
        return
    rows = prompts.rows
    if DIALOGUE not in rows.column_names:
        raise ValueError(
            f"--environment {name}: the prompts of --{flag} are prepared without their messages, "
            "which an environment begins with; name the raw file that they were made of"
        )
    reward = settings.reward
    neural = (reward.rm_pretrain or reward.rm_checkpoint_path) and not reward.no_neural_reward_model
    if name not in ENVIRONMENTS or neural or reward.reward_functions:
        return
    without = [index for index, answer in enumerate(rows["gt_answer"]) if answer is None]
    if without:
        raise ValueError(
            f"--{flag}: {len(without)} of {len(rows)} prompts have no gt_answer (the first: row "
            f"{without[0]}), which --environment {name} compares the last response with; give "
            "every row one, or name another reward (--reward_functions)"
        )
