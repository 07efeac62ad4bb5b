"""Defaults that follow the machine, each said once."""

from argparse import Namespace

import torch

from coati.cli.checks import SHARED_OPTIONS
from coati.parallel.optimizer import can_compile
from coati.parallel.plugin_checks import check_options, resolve_options
from coati.parallel.plugins import HYBRID, PLUGINS, ZERO_3, ParallelOptions
from coati.utils.distributed import world_size
from coati.utils.json_io import load_json
from coati.utils.logging import get_logger

logger = get_logger(__name__)


def parallel_options(args: Namespace) -> ParallelOptions:
    """The parallel flags with every default settled. Raises ValueError naming a flag that this
    machine cannot serve."""
    shared = {name: getattr(args, name) for name in SHARED_OPTIONS}
    plugin = args.plugin or _default_plugin(args)
    plugin_args = load_json(args.plugin_args) if args.plugin_args else {}
    options = ParallelOptions(
        plugin=plugin,
        precision=args.mixed_precision,
        lora=args.lora_rank > 0,
        grad_clip=args.grad_clip,
        batch_size=args.batch_size * getattr(args, "_rows_each", 1),
        packing=getattr(args, "packing", False),
        plugin_args=plugin_args,
        **shared,
    )
    options, notes = resolve_options(options)
    for note in notes:
        logger.warning_once(note)
    precision = args.mixed_precision or _default_precision(options)
    values = {
        name: value for name, value in vars(options).items() if name not in ("plugin", "precision")
    }
    # Flash attention is a GPU's: the model is then loaded with PyTorch's own, and that is said.
    values["use_flash_attn"] = options.use_flash_attn and torch.cuda.is_available()
    check_options(options.plugin, world_size=world_size(), precision=precision, **values)
    args.plugin, args.mixed_precision = options.plugin, precision
    return ParallelOptions(plugin=options.plugin, precision=precision, **values)


def _default_plugin(args: Namespace) -> str:
    if (
        args.tp > 1
        or args.pp > 1
        or args.sp > 1
        or args.enable_sequence_parallelism
        or args.zero_stage
    ):
        name = HYBRID
    elif (
        torch.cuda.device_count() > 1 and world_size() > 1 and can_compile() and not args.lora_rank
    ):
        name = "zero2" if args.mixed_precision == "fp32" or args.zero_cpu_offload else ZERO_3
    elif world_size() == 1 and not torch.cuda.is_available():
        name = "ddp"  # nothing to shard; zero2 would still copy every gradient into its buckets
    else:
        name = "zero2"
    logger.warning_once(f"--plugin is {name} by default here ({PLUGINS[name].best_for}).")
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
    logger.warning_once(f"--mixed_precision is {name} by default here.")
    return name


def check_precision(precision: str) -> None:
    """Raise ValueError for bf16 on a GPU without it."""
    if precision == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise ValueError(
            f"--mixed_precision bf16: {torch.cuda.get_device_name()} has no bf16; use "
            "--mixed_precision fp16 or fp32"
        )
