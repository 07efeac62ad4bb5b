"""Defaults that follow the machine or the model, each logged once."""

from dataclasses import replace
from typing import TypeVar

import torch

from coati.cli.settings import TrainingSettings
from coati.models.positions import positions_in
from coati.parallel.optimizer import can_compile, machine_problem
from coati.parallel.optimizer_table import DEFAULT as ADAMW
from coati.parallel.optimizer_table import OPTIMIZERS, optimizer_problem
from coati.parallel.plugin_checks import check_options, resolve_options
from coati.parallel.plugins import HYBRID, PLUGINS, ZERO_3, ParallelOptions
from coati.utils.distributed import world_size
from coati.utils.logging import get_logger

logger = get_logger(__name__)

Settings = TypeVar("Settings", bound=TrainingSettings)


def resolved_options(settings: TrainingSettings) -> ParallelOptions:
    """The parallel settings with every default resolved. Raises ValueError naming a flag that this
    machine cannot serve."""
    asked = settings.parallel
    options, notes = resolve_options(
        replace(
            asked,
            plugin=settings.plugin
            or _default_plugin(asked, settings.optimizer.optim, settings.whole_weights),
        )
    )
    for note in notes:
        logger.warning_once(note)
    options = replace(
        options,
        precision=asked.precision or _default_precision(options),
        # Flash attention is a GPU's: the model is then loaded with PyTorch's own, and that is said.
        use_flash_attn=options.use_flash_attn and torch.cuda.is_available(),
    )
    check_options(world_size=world_size(), **vars(options))
    optim = settings.optimizer.optim
    if problem := optimizer_problem(optim, options) or machine_problem(optim):
        raise ValueError(problem)
    return options


def _default_plugin(options: ParallelOptions, optim: str, whole_weights: bool = False) -> str:
    row = OPTIMIZERS[optim]
    whole = whole_weights or options.lora
    if options.needs_hybrid:
        name = HYBRID
    elif torch.cuda.device_count() > 1 and world_size() > 1 and can_compile() and not whole:
        fp32 = options.precision == "fp32"
        other = fp32 or options.zero_cpu_offload or optim != ADAMW
        name = "ddp" if row.whole else "zero2" if other else ZERO_3
    elif row.whole or (world_size() == 1 and not torch.cuda.is_available()):
        name = "ddp"  # nothing to shard; zero2 would still copy every gradient into its buckets
    else:
        name = "zero2"
    logger.info(f"--plugin is {name} by default here ({PLUGINS[name].best_for}).")
    return name


def _default_precision(options: ParallelOptions) -> str:
    allowed = PLUGINS[options.plugin].precisions
    if torch.cuda.is_available():
        name = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    else:
        needs_half = "fp32" not in allowed or (
            PLUGINS[options.plugin].hybrid and options.zero_stage
        )
        name = "bf16" if needs_half else "fp32"
    logger.info(f"--mixed_precision is {name} by default here.")
    return name


def check_precision(precision: str | None) -> None:
    """Raise ValueError for bf16 on a GPU without it."""
    if precision == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise ValueError(
            f"--mixed_precision bf16: {torch.cuda.get_device_name()} has no bf16; use "
            "--mixed_precision fp16 or fp32"
        )


def within_model(settings: Settings) -> Settings:
    """``settings`` whose ``--max_length``, where it was left at its default, is at most what the
    model has positions.

    Raises ValueError where that leaves no room for a prompt beside its response.
    """
    model = settings.model
    data = settings.data
    positions = positions_in(model.pretrain, model.trust_remote_code)
    if (
        positions is None
        or "max_length" in settings.flags_written
        or data.max_length <= positions.count
    ):
        return settings
    count = positions.count
    if count <= data.max_seq_len:
        raise ValueError(
            f"--max_seq_len {data.max_seq_len}: this {positions.family} model has {count} "
            "positions for prompt and response together; lower --max_seq_len"
        )
    logger.info(
        f"--max_length is {count} by default here: this {positions.family} model has {count} "
        "positions."
    )
    flags = {**settings.flags, "max_length": count}
    return replace(settings, data=replace(data, max_length=count), flags=flags)
