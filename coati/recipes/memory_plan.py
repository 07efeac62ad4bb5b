"""From a run's settings to what its memory depends on."""

import math
from dataclasses import replace
from typing import Any

import torch

from coati.cli.distilling import GKDSettings
from coati.cli.online_settings import (
    OnlineDPOSettings,
    OnlineSettings,
    PPOSettings,
)
from coati.cli.settings import (
    DPOSettings,
    ILQLSettings,
    KTOSettings,
    ORPOSettings,
    RMSettings,
    SFTSettings,
    SLSettings,
    TrainingSettings,
)
from coati.models.loading import base_below, find_model
from coati.models.lora.lora import ATTENTION, LoraConfig
from coati.models.loss_registry import needs_reference
from coati.parallel.engine import Engine
from coati.parallel.estimate import describe_estimate, estimate_memory
from coati.parallel.footprint.model_shape import ModelShape, load_shape
from coati.parallel.footprint.training_memory import estimate
from coati.parallel.footprint.training_plan import TrainingPlan
from coati.parallel.options import ParallelOptions
from coati.recipes import build
from coati.recipes.run import Run
from coati.utils.distributed import world_size
from coati.utils.memory import in_units

ATTENTION_LAYERS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj")
METHODS: dict[type, str] = {
    PPOSettings: "ppo",
    OnlineSettings: "grpo",
    OnlineDPOSettings: "online_dpo",
    DPOSettings: "dpo",
    RMSettings: "rm",
    ORPOSettings: "orpo",
    KTOSettings: "kto",
    GKDSettings: "gkd",
    ILQLSettings: "ilql",
    SFTSettings: "sft",
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
    dropout = type(settings) is SFTSettings and lora is not None and lora.linear_lora_dropout > 0
    plan = TrainingPlan(
        method=METHODS[type(settings)],
        options=options,
        processes=processes,
        length=min(longest, settings.data.max_length),
        lora_rank=lora.r if lora else 0,
        lora_targets=_targets(lora),
        quantize_base=lora.quantize_base if lora else None,
        dora=bool(lora and lora.use_dora),
        lora_dropout=dropout,
        reference=not lora and _has_reference(settings),
        on_gpu=on_gpu,
        optim=settings.optimizer.optim,
    )
    if isinstance(settings, OnlineSettings):
        return _with_rollouts(plan, settings, longest)
    assert isinstance(settings, SLSettings)
    if settings.data.packing:
        plan = replace(plan, length=settings.data.max_length)
    if isinstance(settings, GKDSettings):
        plan = _with_teacher(plan, settings)
    return replace(plan, batch_size=settings.batches.batch_size)


def _targets(lora: LoraConfig | None) -> frozenset[str] | None:
    """The last parts of the adapted layers' names; None: every linear layer."""
    if lora is None or lora.target_modules is None:
        return None
    if lora.target_modules == ATTENTION:
        return frozenset(ATTENTION_LAYERS)
    return frozenset(name.rsplit(".", 1)[-1] for name in lora.target_modules)


def _has_reference(settings: Any) -> bool:
    """Whether a copy of the policy is held."""
    pairs = isinstance(settings, DPOSettings | OnlineDPOSettings)
    if isinstance(settings, OnlineSettings) and not pairs:
        return bool(settings.kl.kl_coef) or settings.kl.kl_target is not None
    if pairs and not needs_reference(settings.loss.loss_type):
        return False
    reference = getattr(settings, "reference", None)
    if reference is None:
        return False
    return not (reference.disable_reference_model or reference.precompute_ref)


def _with_teacher(plan: TrainingPlan, settings: GKDSettings) -> TrainingPlan:
    """Responses of the student may be longer than those of its rows."""
    batches = settings.batches
    own = settings.sampling
    teacher = None
    if settings.teaching.teacher is not None:
        teacher = load_shape(base_below(find_model(settings.teaching.teacher, "actor")))
    if not own.gkd_lambda:
        return replace(plan, teacher=teacher)
    answered = math.ceil(own.gkd_lambda * batches.batch_size * batches.accumulation_steps)
    return replace(
        plan,
        teacher=teacher,
        rollout_rows=min(own.inference_batch_size or answered, answered),
        forward_rows=batches.batch_size,
    )


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
    first = next(iter(engines.values()))
    try:
        plan = plan_of(
            run.settings,
            run.options,
            processes=world_size(),
            on_gpu=torch.cuda.is_available(),
            longest=longest,
        )
        shape = ModelShape.of(first.module.config.to_dict())
    except ValueError as error:
        named = len(engines) > 1
        optim = run.settings.optimizer.optim
        lines = {name: estimate_memory(engine, optim) for name, engine in engines.items()}
        held = [f"{name}: {line}" if named else line for name, line in lines.items()]
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
