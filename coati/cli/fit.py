"""The flags of ``coati fit``."""

import argparse
import re
from collections.abc import Sequence

from coati.cli.parser import Parser
from coati.cli.program_settings import FitSettings
from coati.cli.settings import filled
from coati.cli.values import add_count, add_switch, add_text
from coati.models.quantization_registry import BASES
from coati.parallel.footprint.fitting import METHODS
from coati.parallel.optimizer_table import DEFAULT, OPTIMIZERS

UNITS = {"": 10**9, "GB": 10**9, "GIB": 2**30, "MB": 10**6, "MIB": 2**20}


def amount(text: str) -> float:
    """Bytes of "24GB" (10^9 each), "24GiB" (2^30) or "24" (GB)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    if not found or found[2].upper() not in UNITS or not float(found[1]):
        raise argparse.ArgumentTypeError(
            f"expected an amount of memory like 24GB or 80GiB, found {text!r}"
        )
    return float(found[1]) * UNITS[found[2].upper()]


def _add_memory_flags(parser: Parser) -> None:
    """Flags of training that change what it takes."""
    parser.add_argument(
        "--optim",
        choices=tuple(OPTIMIZERS),
        default=DEFAULT,
        help="the optimizer (coati sft --help)",
    )
    add_switch(
        parser,
        "--offload_activations",
        help="where layers are computed again, their inputs wait in host memory",
    )
    add_count(
        parser,
        "--tokens_per_batch",
        unit="TOKENS",
        help="micro-batches are cut by so many tokens, whatever the batch",
    )
    parser.add_argument(
        "--quantize_base",
        choices=tuple(BASES),
        help="how the base below adapters is stored; default: in the precision of the run",
    )


def fit_parser() -> Parser:
    """The parser of ``coati fit``."""
    parser = Parser(
        prog="coati fit",
        usage="%(prog)s MODEL --memory 24GB [flags]",
        description="Which settings train a model in the memory of a GPU: plugin, all weights or "
        "LoRA, gradient checkpointing and the largest batch, with the flags to paste. No weights "
        "are loaded; nothing is downloaded.",
    )
    add_text(
        parser,
        "--model",
        unit="MODEL",
        help="directory with config.json, or the name of a well-known model, such as Qwen3-8B",
    )
    parser.add_argument(
        "--memory", type=amount, metavar="AMOUNT", help="memory of one GPU: 24GB, 80GiB"
    )
    add_count(parser, "--gpus", default=1, help="GPUs of the run")
    about = "; ".join(f"{name}: {what}" for name, what in METHODS.items())
    parser.add_argument("--method", choices=tuple(METHODS), default="sft", help=about)
    add_text(
        parser,
        "--teacher",
        unit="MODEL",
        help="--method gkd: the teacher, as --model; default: of the same size",
    )
    add_count(
        parser,
        "--max_length",
        default=2048,
        unit="TOKENS",
        least=2,
        help="tokens of a row; of a prompt and its response, half of them the response's",
    )
    add_count(
        parser, "--lora_rank", default=16, unit="R", help="rank of the adapters that are tried"
    )
    _add_memory_flags(parser)
    add_switch(
        parser,
        "--table",
        help="print what each well-known model takes for each method, as Markdown",
    )
    return parser


def parse_fit(argv: Sequence[str] | None = None, prog: str | None = None) -> FitSettings:
    """The checked flags. Exits with code 2 and one line naming a wrong flag."""
    parser = fit_parser().named(prog)
    args = parser.parse_args(argv)
    if not args.table:
        if args.model is None:
            parser.error("--model is required: a directory with config.json, or Qwen3-8B and such")
        if args.memory is None:
            parser.error("--memory is required: what one GPU has, such as 24GB")
    if args.teacher is not None and args.method != "gkd":
        parser.error(f"--teacher belongs to --method gkd, not {args.method}")
    return filled(FitSettings, vars(args))
