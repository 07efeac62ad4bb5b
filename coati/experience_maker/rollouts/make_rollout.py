"""The engine that a run has chosen; those that are not are not imported."""

from typing import Any

from coati.experience_maker.rollouts.rollout_engine import ModelRollout, RolloutEngine
from coati.parallel.engine import Engine


def make_rollout(
    name: str, engine: Engine, *, elsewhere: Any = None, **settings: Any
) -> RolloutEngine:
    """The engine called ``name`` ("model", "vllm", "http" or "ray"); ``settings`` are those of
    :class:`~coati.experience_maker.rollouts.rollout_engine.ModelRollout`.

    ``elsewhere``: what another engine needs beside them
    (:class:`~coati.experience_maker.rollouts.vllm_rollout.VllmOptions`,
    :class:`~coati.experience_maker.rollouts.http_rollout.ServerOptions`,
    :class:`~coati.experience_maker.rollouts.ray_rollout.RayOptions`). Raises ValueError for
    another name or where the engine cannot work.
    """
    if name == "model":
        return ModelRollout(engine, **settings)
    if name == "vllm":
        from coati.experience_maker.rollouts.vllm_rollout import VllmRollout

        return VllmRollout(engine, elsewhere, **settings)
    if name == "http":
        from coati.experience_maker.rollouts.http_rollout import HttpRollout

        return HttpRollout(engine, elsewhere, **settings)
    if name == "ray":
        from coati.experience_maker.rollouts.ray_rollout import RayRollout

        return RayRollout(engine, elsewhere, **settings)
    raise ValueError(f"--rollout_engine {name}: unknown; choose model, vllm, http or ray")
