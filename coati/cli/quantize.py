"""The flags of ``coati quantize`` and of ``coati measure``."""

from collections.abc import Sequence

from coati.cli.checks import checked
from coati.cli.model_flags import add_beta_gen_flag, add_trust_flag
from coati.cli.parser import OlderFlags, Parser
from coati.cli.program_settings import BenchmarkSettings, QuantizeSettings
from coati.cli.settings import filled
from coati.cli.values import add_count, add_text
from coati.models.quantization_registry import CALIBRATED, METHODS, QUANTS

FULL = "full"


def quantize_parser() -> Parser:
    """The parser of ``coati quantize``."""
    parser = Parser(
        prog="coati quantize",
        usage="%(prog)s --model_path MODEL --output_dir DIR --method METHOD [METHOD ...] [flags]",
        description="Quantizes a model and compares size, perplexity and speed with the original.",
    )
    add_text(
        parser,
        "--model_path",
        unit="MODEL",
        help="directory that training wrote, or a checkpoint (required)",
    )
    add_text(
        parser,
        "--output_dir",
        help="new directory; with several methods, a subfolder for each (required)",
    )
    parser.add_argument(
        "--method",
        nargs="+",
        choices=tuple(METHODS),
        default=[],
        help="; ".join(f"{name}: {what}" for name, what in METHODS.items()) + " (required)",
    )
    _add_measuring_flags(parser)
    add_text(parser, "--output", unit="FILE", help="also write the results as JSON")
    add_trust_flag(parser)
    return parser


def _add_measuring_flags(parser: Parser) -> None:
    parser.add_argument(
        "--calibration",
        nargs="+",
        default=[],
        metavar="FILE",
        help="calibration conversations for gptq",
    )
    add_count(
        parser,
        "--calibration_rows",
        default=64,
        unit="ROWS",
        help="use the first ROWS rows of --calibration",
    )
    add_count(
        parser,
        "--group_size",
        default=128,
        least=8,
        help="gptq, rtn: weights per quantization group, which share a scale",
    )
    parser.add_argument(
        "--eval",
        nargs="+",
        default=[],
        metavar="FILE",
        help="conversations to measure the perplexity on (required)",
    )
    add_count(
        parser,
        "--max_length",
        default=1024,
        unit="TOKENS",
        least=2,
        help="longer rows are truncated",
    )
    add_count(
        parser, "--new_tokens", default=32, unit="TOKENS", help="generated when measuring speed"
    )


def parse_quantize(argv: Sequence[str] | None = None, prog: str | None = None) -> QuantizeSettings:
    """The checked flags. Exits with code 2 and one line naming a wrong flag."""
    parser = quantize_parser().named(prog)
    args = parser.parse_args(argv)
    for flag, what in (
        ("model_path", "the model to quantize"),
        ("output_dir", "where to write"),
        ("method", f"one or more of {', '.join(METHODS)}"),
        ("eval", "conversations to measure the perplexity on"),
    ):
        if not getattr(args, flag):
            parser.error(f"--{flag} is required: {what}")
    for method in args.method:
        if method in CALIBRATED and not args.calibration:
            parser.error(
                f"--method {method} needs --calibration FILE: conversations like those the model "
                "will see, but not those of --eval, which measure the result"
            )
    return filled(QuantizeSettings, vars(args))


def benchmark_parser() -> Parser:
    """The parser of ``coati measure``."""
    parser = Parser(
        prog="coati measure",
        usage="%(prog)s --model_path MODEL [flags]",
        description="Measures load time, time to first token, tokens per second and peak memory of "
        "a model, each quantization in a separate process.",
    )
    add_text(
        parser, "--model_path", unit="MODEL", help="any model that coati chat loads (required)"
    )
    parser.add_argument(
        "--quant",
        nargs="+",
        choices=(FULL, *QUANTS),
        default=[FULL, *QUANTS],
        help="quantizations to measure; full: none",
    )
    parser.add_argument(
        "--batch_size",
        nargs="+",
        type=int,
        default=[1, 8, 32],
        metavar="N",
        help="sequences generated at a time",
    )
    add_beta_gen_flag(parser)
    add_count(parser, "--prompt_tokens", default=64, unit="TOKENS", help="length of each prompt")
    add_count(parser, "--new_tokens", default=32, unit="TOKENS", help="length of each response")
    add_text(parser, "--output", unit="FILE", help="also write the results as JSON")
    add_trust_flag(parser)
    return parser


def parse_benchmark(
    argv: Sequence[str] | None = None,
    older: OlderFlags | None = None,
    prog: str | None = None,
) -> BenchmarkSettings:
    """The checked flags. Exits with code 2 and one line naming a wrong flag."""
    parser = benchmark_parser().named(prog)
    args = checked(parser, argv, older=older)
    if args.model_path is None:
        parser.error(
            "--model_path is required: a model directory, a LoRA adapter or a training checkpoint"
        )
    if min(args.batch_size) < 1:
        parser.error(f"--batch_size must be at least 1, not {min(args.batch_size)}")
    return filled(BenchmarkSettings, vars(args))
