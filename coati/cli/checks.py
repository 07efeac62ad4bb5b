"""What can be found wrong with flags before torch is imported. All raise ValueError with flag,
finding and remedy."""

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from coati.parallel.plugin_checks import check_options
from coati.parallel.plugins import HYBRID
from coati.utils.json_io import load_json

SHARED_OPTIONS = (
    "tp",
    "pp",
    "sp",
    "sp_mode",
    "enable_sequence_parallelism",
    "zero_stage",
    "zero_cpu_offload",
    "accumulation_steps",
    "microbatch_size",
    "grad_checkpoint",
    "use_flash_attn",
)


def check_sft(args: Namespace) -> None:
    """Check the flags of ``train_sft.py`` and settle ``lora_rank``."""
    if not args.pretrain:
        raise ValueError(
            "--pretrain is missing: the Hugging Face model directory or hub name to start from"
        )
    if not args.dataset:
        raise ValueError(
            "--dataset is missing: prepared arrow directories (prepare_dataset.py) or a raw json "
            "file"
        )
    check_paths(args)
    check_mixture(args)
    check_lora(args)
    check_pointless(args)
    check_parallel(args)


def check_paths(args: Namespace, data: tuple[str, ...] = ("dataset", "eval_dataset")) -> None:
    """Every named input must be there. ``data``: the flags that name rows; a hub name will do but
    to evaluate on."""
    for flag in data:
        for path in getattr(args, flag):
            if not (
                Path(path).exists() or (not flag.startswith("eval_") and _may_be_hub_name(path))
            ):
                raise ValueError(f"--{flag} {path}: there is no such file or directory")
    for flag in ("lora_config", "plugin_args", "conversation_template_config"):
        path = getattr(args, flag)
        if path is not None and not isinstance(read_json(flag, path), dict):
            raise ValueError(
                f"--{flag} {path}: expected a JSON object {{...}}, found another kind of value"
            )
    if args.checkpoint_path not in (None, "auto") and not Path(args.checkpoint_path).is_dir():
        raise ValueError(
            f"--checkpoint_path {args.checkpoint_path}: there is no such directory; name one, or "
            "`auto`"
        )


def _may_be_hub_name(path: str) -> bool:
    """``owner/name`` or ``owner/name:subset``, where no folder ``owner`` is here."""
    owner, _, name = path.partition(":")[0].partition("/")
    return (
        bool(owner and name)
        and "/" not in name
        and owner[0] not in ".~"
        and not Path(owner).is_dir()
    )


def check_mixture(args: Namespace) -> None:
    """One weight for each data set, and no flag that cuts the sets otherwise."""
    weights, paths = args.dataset_weights, args.dataset
    if not weights:
        return
    if len(weights) != len(paths):
        raise ValueError(
            f"--dataset_weights has {len(weights)} values ({' '.join(f'{w:g}' for w in weights)}), "
            "--dataset has "
            f"{len(paths)} paths ({' '.join(paths)}); give one weight for each path"
        )
    if args.max_samples:
        raise ValueError(
            "--max_samples takes the first rows of all --dataset paths laid end to end, which "
            "--dataset_weights mixes; "
            "use --max_steps to train for less than an epoch"
        )


def read_json(flag: str, path: str) -> Any:
    try:
        return load_json(path)
    except OSError as error:
        raise ValueError(f"--{flag} {path}: {error.strerror}; expected a JSON file") from error
    except ValueError as error:
        raise ValueError(f"--{flag} {error}") from error


def check_lora(args: Namespace) -> None:
    """Set ``args.lora_rank`` to the rank that holds: the flag's, else the file's, else 0."""
    if args.lora_rank is None:
        args.lora_rank = load_json(args.lora_config).get("r", 0) if args.lora_config else 0
    if not isinstance(args.lora_rank, int) or args.lora_rank < 0:
        raise ValueError(
            f"--lora_config {args.lora_config}: r must be a whole number, found {args.lora_rank!r}"
        )
    if args.lora_rank:
        return
    for flag in ("lora_alpha", "lora_train_bias", "merge_lora_weights"):
        if getattr(args, flag):
            raise ValueError(
                f"--{flag} does nothing without LoRA: set --lora_rank (20 to 64) or --lora_config"
            )


def check_pointless(args: Namespace) -> None:
    """A flag that would have no effect is a mistake somewhere else."""
    for flag in ("eval_interval", "eval_batch_size"):
        if getattr(args, flag) is not None and not args.eval_dataset:
            raise ValueError(f"--{flag} does nothing without --eval_dataset")
    own_split = any(not Path(path).is_file() for path in args.dataset)
    if args.metric_for_best is not None and not args.eval_dataset and not own_split:
        raise ValueError("--metric_for_best does nothing without --eval_dataset")
    if args.checkpoint_weights_only and args.checkpoint_path is None:
        raise ValueError("--checkpoint_weights_only does nothing without --checkpoint_path")


def check_parallel(args: Namespace) -> None:
    """Refuse what the plugin cannot do, as far as it is known before the machine has been looked
    at."""
    split = (
        args.tp > 1
        or args.pp > 1
        or args.sp > 1
        or args.enable_sequence_parallelism
        or args.zero_stage > 0
    )
    plugin = args.plugin or (HYBRID if split else None)
    if plugin is None:
        return
    check_options(
        plugin,
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        # Every plugin has bf16; the default is chosen to fit the plugin once the machine is known.
        precision=args.mixed_precision or "bf16",
        lora=args.lora_rank > 0,
        batch_size=args.batch_size * getattr(args, "_rows_each", 1),
        packing=getattr(args, "packing", False),
        **{name: getattr(args, name) for name in SHARED_OPTIONS},
    )
