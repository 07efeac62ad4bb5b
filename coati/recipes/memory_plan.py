"""From a run's settings to what its memory depends on."""

from dataclasses import replace
from typing import Any

import torch

from coati.cli.settings import (
    DPOSettings,
    KTOSettings,
    OnlineSettings,
    ORPOSettings,
    PPOSettings,
    RMSettings,
    SLSettings,
    TrainingSettings,
)
from coati.models.loss_registry import needs_reference
from coati.parallel.engine import Engine
from coati.parallel.estimate import describe_estimate, estimate_memory
from coati.parallel.footprint.model_shape import ModelShape
from coati.parallel.footprint.training_memory import TrainingPlan, estimate
from coati.parallel.options import ParallelOptions
from coati.recipes import build
from coati.recipes.run import Run
from coati.utils.distributed import world_size
from coati.utils.memory import in_units

METHODS: dict[type, str] = {
    PPOSettings: "ppo",
    OnlineSettings: "grpo",
    DPOSettings: "dpo",
    RMSettings: "rm",
    ORPOSettings: "orpo",
    KTOSettings: "kto",
    SLSettings: "sft",
}


def plan_of(
    settings: TrainingSettings,
    options: ParallelOptions,
    *,
    processes: int,
    on_gpu: bool,
    longest: int,
) -> TrainingPlan:
    """The plan of a run with the resolved ``options``. ``longest``: tokens of its longest row (with
    rollouts, of its longest prompt)."""
    lora = build.lora_config(settings.lora) if options.lora else None
    dropout = type(settings) is SLSettings and lora is not None and lora.linear_lora_dropout > 0
    plan = TrainingPlan(
        method=METHODS[type(settings)],
        options=options,
        processes=processes,
        length=min(longest, settings.data.max_length),
        lora_rank=lora.r if lora else 0,
        lora_targets=frozenset(lora.target_modules) if lora and lora.target_modules else None,
        lora_dropout=dropout,
        reference=not lora and _has_reference(settings),
        on_gpu=on_gpu,
    )
    if isinstance(settings, OnlineSettings):
        return _with_rollouts(plan, settings, longest)
    assert isinstance(settings, SLSettings)
    if settings.data.packing:
        plan = replace(plan, length=settings.data.max_length)
    return replace(plan, batch_size=settings.batches.batch_size)


def _has_reference(settings: Any) -> bool:
    """Whether a copy of the policy is held."""
    if isinstance(settings, OnlineSettings):
        return bool(settings.kl.kl_coef) or settings.kl.kl_target is not None
    if isinstance(settings, DPOSettings) and not needs_reference(settings.loss.loss_type):
        return False
    reference = getattr(settings, "reference", None)
    if reference is None:
        return False
    return not (reference.disable_reference_model or reference.precompute_ref)


def _with_rollouts(
    plan: TrainingPlan, settings: OnlineSettings, longest_prompt: int
) -> TrainingPlan:
    rollout = settings.rollout
    update = settings.update
    reward = settings.reward
    length = min(longest_prompt + rollout.max_seq_len, settings.data.max_length)
    neural = reward.rm_checkpoint_path or reward.rm_pretrain
    sampled = rollout.experience_batch_size * rollout.num_generations
    # A second backward pass adds to the gradients of the first.
    steps = max(update.accumulation_steps, 2 if settings.ptx.ptx_coef else 1)
    return replace(
        plan,
        options=replace(plan.options, accumulation_steps=steps),
        batch_size=update.train_batch_size,
        length=length,
        supervised=rollout.max_seq_len / length,
        reward_model=bool(neural) and not reward.no_neural_reward_model,
        offload_inference=rollout.offload_inference_models,
        rollout_rows=rollout.inference_batch_size or sampled,
        forward_rows=rollout.logits_forward_batch_size or update.train_batch_size,
    )


def memory_lines(run: Run[Any], engines: dict[str, Engine], longest: int) -> list[str]:
    """What the run takes, estimated; for a model without a formula what its engines hold before
    activations, and why there is no more. ``longest`` as in :func:`plan_of`."""
    plan = plan_of(
        run.settings,
        run.options,
        processes=world_size(),
        on_gpu=torch.cuda.is_available(),
        longest=longest,
    )
    first = next(iter(engines.values()))
    try:
        shape = ModelShape.of(first.module.config.to_dict())
    except ValueError as error:
        named = len(engines) > 1
        held = [
            f"{name}: {estimate_memory(engine)}" if named else estimate_memory(engine)
            for name, engine in engines.items()
        ]
        return [*held, f"activations come on top: {error}"]
    return [describe_estimate(estimate(shape, plan))]


def measured_memory(run: Run[Any], peaks: list[float]) -> str:
    """The highest of ``peaks`` (MiB of each rank) as it stands beside the estimate: on a CPU
    without what the process had resident before the run."""
    peak = max(peaks) * 2**20
    if torch.cuda.is_available():
        return f"memory per process, measured: {in_units(peak)} at its peak"
    before = run.resident_before * 2**20
    return (
        f"memory per process, measured: {in_units(peak - before)} at its peak, besides "
        f"{in_units(before)} of libraries; freed memory that the process keeps counts "
        "(docs/resources.md)"
    )
