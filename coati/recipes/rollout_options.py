"""From the flags of a run to what an engine of rollouts outside the trained model is told."""

import os
from pathlib import Path
from typing import Any

from coati.cli.settings import OnlineSettings
from coati.experience_maker.rollouts.http_rollout import ServerOptions
from coati.experience_maker.rollouts.model_facts import facts_of
from coati.experience_maker.rollouts.vllm_rollout import VllmOptions
from coati.recipes.run import Run

FOLDER = "rollout_weights"  # in --save_dir


def engine_options(run: Run[OnlineSettings], config: Any) -> VllmOptions | ServerOptions | None:
    """What :func:`~coati.experience_maker.rollouts.make_rollout.make_rollout` takes as
    ``elsewhere``; None for the model itself. ``config``: the policy's."""
    settings = run.settings
    engine = settings.engine
    model = settings.model
    name = settings.rollout.rollout_engine
    if name == "vllm":
        return VllmOptions(
            model.pretrain,
            precision=run.options.precision or "bf16",
            max_length=settings.data.max_length,
            memory_share=engine.vllm_memory_share,
            sleep=engine.vllm_sleep,
            trust_remote_code=model.trust_remote_code,
        )
    if name != "http":
        return None
    token = engine.rollout_token_env
    temperatures = settings.sampling.initial_temperature, settings.sampling.final_temperature
    return ServerOptions(
        engine.rollout_url,
        weights_folder(settings),
        facts_of(config),
        settings.data.max_length,
        sync=engine.rollout_sync,
        timeout=engine.rollout_timeout,
        token=None if token is None else os.environ[token],
        temperatures=(min(temperatures), max(temperatures)),
    )


def weights_folder(settings: OnlineSettings) -> Path:
    """A directory that belongs to this run alone: another one of the same ``--rollout_weights_dir``
    has another ``--save_dir``."""
    save_dir = Path(settings.output.save_dir).absolute()
    parent = settings.engine.rollout_weights_dir
    if parent is None:
        return save_dir / FOLDER
    return Path(parent).absolute() / "-".join((FOLDER, *save_dir.parts[1:]))
