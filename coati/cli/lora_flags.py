"""The flags of LoRA, their checks, and the files that they name."""

import argparse
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coati.cli.parser import Parser
from coati.cli.values import add_count, add_number, add_switch, add_text
from coati.models.quantization_registry import BASES
from coati.utils.json_io import load_json
from coati.utils.packages import require_bitsandbytes

TARGETS = ("all-linear", "attention")
# Flags that say nothing where there are no adapters.
OF_ADAPTERS = (
    *("lora_alpha", "lora_train_bias", "lora_experts", "merge_lora_weights", "lora_target"),
    *("use_dora", "use_rslora", "lora_plus_ratio", "quantize_base"),
)
# Keys of --lora_config that other flags' checks depend on.
_OF_THE_FILE = ("use_dora", "use_rslora", "quantize_base")


def add_lora_flags(parser: Parser) -> argparse._ArgumentGroup:
    """The group "LoRA", which a trainer may add to."""
    group = parser.add_argument_group("LoRA", "Train low-rank adapters instead of all weights.")
    add_count(
        group,
        "--lora_rank",
        unit="R",
        least=0,
        help="rank R of the adapters (20 to 64 is usual), 0: no LoRA; default: r of --lora_config",
    )
    add_number(
        group,
        "--lora_alpha",
        unit="A",
        exclusive=True,
        help="scale of the adapters: A / R; default: 32",
    )
    add_text(
        group,
        "--lora_target",
        unit="LAYERS",
        help="layers to adapt: all-linear, attention, or a file of names or their endings, one a "
        "line; default: all-linear",
    )
    group.add_argument(
        "--lora_train_bias",
        choices=("none", "all", "lora"),
        help="biases to train as well; default: none",
    )
    group.add_argument(
        "--quantize_base",
        choices=tuple(BASES),
        help="QLoRA: store the frozen base in few bits; "
        + "; ".join(f"{name}: {what}" for name, what in BASES.items()),
    )
    add_switch(group, "--use_dora", help="DoRA: train the magnitudes of the adapted weights apart")
    add_switch(group, "--use_rslora", help="rank-stabilized LoRA: scale by A / sqrt(R)")
    add_number(
        group,
        "--lora_plus_ratio",
        unit="RATIO",
        exclusive=True,
        help="LoRA+: learning rate of the adapters' B in units of --lr (16 is usual); default: 1",
    )
    add_text(
        group,
        "--lora_config",
        unit="FILE",
        help="JSON with r, lora_alpha, dropouts, initialization and target_modules; the flags "
        "above override it",
    )
    add_switch(
        group,
        "--lora_experts",
        help="adapt the experts of a mixture-of-experts model too (linear_lora_dropout 0)",
    )
    add_switch(group, "--merge_lora_weights", help="merge the adapters into the final model")
    return group


def check_lora(args: Namespace) -> None:
    """Set ``args.lora_rank`` to the rank that holds, the flag's, else the file's, else 0, and what
    the file says of the base and of DoRA where no flag does."""
    held = load_json(args.lora_config) if args.lora_config else {}
    if args.lora_rank is None:
        args.lora_rank = _rank_of(held, args.lora_config) if args.lora_config else 0
    whole = isinstance(args.lora_rank, int) and not isinstance(args.lora_rank, bool)
    if not whole or args.lora_rank < 0:
        raise ValueError(
            f"--lora_config {args.lora_config}: r must be a whole number, found {args.lora_rank!r}"
        )
    if not args.lora_rank:
        _check_pointless(args)
        return
    if (kind := held.get("quantize_base")) is not None and kind not in BASES:
        raise ValueError(
            f"--lora_config {args.lora_config}: quantize_base must be one of {', '.join(BASES)}, "
            f"not {kind!r}"
        )
    for name in _OF_THE_FILE:
        setattr(args, name, getattr(args, name) or held.get(name) or getattr(args, name))
    if args.lora_target is not None and args.lora_target not in TARGETS:
        read_targets(args.lora_target)
    if args.quantize_base == "nf4":
        require_bitsandbytes("--quantize_base nf4")
    _check_start(args, held)


def _check_pointless(args: Namespace) -> None:
    for flag in OF_ADAPTERS:
        if getattr(args, flag):
            value = f" {args.quantize_base}" if flag == "quantize_base" else ""
            why = ": weights of few bits cannot be trained themselves" if value else ""
            raise ValueError(
                f"--{flag}{value} does nothing without LoRA{why}: set --lora_rank (20 to 64) or "
                "--lora_config"
            )


def _check_start(args: Namespace, held: Mapping[str, Any]) -> None:
    """Refuse what needs the weights themselves, or plain factors."""
    pissa = held.get("lora_initialization_method") == "PiSSA"
    if pissa and (args.quantize_base or args.use_dora):
        flag = f"--quantize_base {args.quantize_base}" if args.quantize_base else "--use_dora"
        raise ValueError(
            f"{flag}: PiSSA (lora_initialization_method of --lora_config {args.lora_config}) "
            "cannot start there; use kaiming_uniform"
        )
    if args.use_dora and (args.lora_experts or held.get("lora_experts")):
        raise ValueError(
            "--use_dora with --lora_experts: DoRA is for linear layers; leave one of the two out"
        )


def read_targets(path: str) -> list[str]:
    """The names in the file of ``--lora_target``. Raises ValueError for one that cannot be read or
    holds none."""
    wanted = f"expected {', '.join(TARGETS)} or a file with the name of a layer in each line"
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ValueError(f"--lora_target {path}: {error.strerror}; {wanted}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--lora_target {path}: not UTF-8 text; {wanted}") from error
    names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not names:
        raise ValueError(f"--lora_target {path}: holds no name; {wanted}")
    for number, line in enumerate(lines, 1):
        if len(line.split()) > 1 and not line.startswith("#"):
            raise ValueError(
                f"--lora_target {path}, line {number}: {line.strip()[:60]!r} is no name of a "
                f"layer; {wanted}"
            )
    return names


def _rank_of(held: Mapping[str, Any], lora_config: str) -> Any:
    """``r`` of a ``--lora_config`` without ``--lora_rank``, which says whether there is LoRA."""
    if held and "r" not in held:
        raise ValueError(
            f"--lora_config {lora_config}: no r, the rank (its keys are {', '.join(held)}); "
            "write it there, or give --lora_rank"
        )
    return held.get("r", 0)
