"""From the flags of a run to what an engine of rollouts outside the trained model is told."""

import os
from pathlib import Path
from typing import Any

from coati.cli.online_settings import OnlineSettings
from coati.experience_maker.rollouts.http_rollout import ServerOptions
from coati.experience_maker.rollouts.model_facts import facts_of
from coati.experience_maker.rollouts.ray_rollout import RayOptions
from coati.experience_maker.rollouts.rollout_engine import RolloutEngine
from coati.experience_maker.rollouts.vllm_rollout import VllmOptions
from coati.recipes.run import Run
from coati.rewards.ray_tasks import TASK_CPUS

FOLDER = "rollout_weights"  # in --save_dir


def engine_options(
    run: Run[OnlineSettings], config: Any
) -> VllmOptions | ServerOptions | RayOptions | None:
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
    if name == "ray":
        return _ray_options(run, config)
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


def _ray_options(run: Run[OnlineSettings], config: Any) -> RayOptions:
    settings = run.settings
    engine = settings.engine
    place = Path(settings.model.pretrain)
    return RayOptions(
        engine.rollout_workers or 1,
        # A process of the cluster starts elsewhere.
        str(place.absolute()) if place.exists() else settings.model.pretrain,
        facts_of(config),
        settings.data.max_length,
        address=engine.ray_address,
        python=engine.rollout_python,
        cpus=engine.rollout_worker_cpus,
        gpus=engine.rollout_worker_gpus,
        spare=TASK_CPUS if settings.slow_rewards.rewards_on_ray else 0.0,
        precision=run.options.precision or "bf16",
        timeout=engine.rollout_timeout,
        trust_remote_code=settings.model.trust_remote_code,
    )


def check_correctable(settings: OnlineSettings, rollout: RolloutEngine) -> None:
    """Raise ValueError where responses of older weights are to be corrected by log-probs that
    ``rollout`` does not give; it is closed."""
    ahead = settings.rollout.rollouts_ahead
    if not ahead or settings.update.rollout_is == "none":
        return
    if getattr(rollout, "gives_logprobs", True):
        return
    rollout.close()
    raise ValueError(
        f"--rollouts_ahead {ahead}: responses of older weights are corrected by the log-probs that "
        "they were sampled with (--rollout_is), and the engine gives none of the whole "
        "distribution here; leave --top_k, --top_p and --repetition_penalty out, or take "
        "--rollout_is none, or --rollouts_ahead 0"
    )


def weights_folder(settings: OnlineSettings) -> Path:
    """A directory that belongs to this run alone: another one of the same ``--rollout_weights_dir``
    has another ``--save_dir``."""
    save_dir = Path(settings.output.save_dir).absolute()
    parent = settings.engine.rollout_weights_dir
    if parent is None:
        return save_dir / FOLDER
    return Path(parent).absolute() / "-".join((FOLDER, *save_dir.parts[1:]))
