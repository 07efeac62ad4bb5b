"""The flags of ``coati sample-prompts``."""

from collections.abc import Sequence
from pathlib import Path

from coati.cli.parser import Parser
from coati.cli.program_settings import PromptSampleSettings
from coati.cli.row_flags import add_column_flags, check_columns
from coati.cli.settings import filled
from coati.cli.values import add_count, add_text


def prompts_parser() -> Parser:
    """The parser of ``coati sample-prompts``."""
    parser = Parser(
        prog="coati sample-prompts",
        usage="%(prog)s --dataset_path PATH [--save_path FILE] [--sample_size N]",
        description="Draws a random sample of prompts from a dataset, as rows for "
        "coati prepare --type prompt.",
    )
    add_text(
        parser,
        "--dataset_path",
        unit="PATH",
        help="file, folder or dataset name, in any row format; a final response is left out "
        "(required)",
    )
    add_text(
        parser,
        "--save_path",
        default="prompt.json",
        unit="FILE",
        help="JSON array to write; must not exist yet",
    )
    add_count(
        parser,
        "--sample_size",
        default=16384,
        help="prompts to draw; a smaller dataset is taken whole",
    )
    add_count(parser, "--seed", default=42, least=0, help="random seed of the sampling")
    add_column_flags(parser)
    return parser


def parse_prompts(
    argv: Sequence[str] | None = None, prog: str | None = None
) -> PromptSampleSettings:
    """The checked flags. Exits with code 2 and one line naming a wrong flag."""
    parser = prompts_parser().named(prog)
    args = parser.parse_args(argv)
    if not args.dataset_path:
        parser.error("--dataset_path is required: the rows to take the prompts from")
    if Path(args.save_path).exists():
        parser.error(
            f"--save_path {args.save_path} exists already; name another file, or remove this one"
        )
    try:
        check_columns(args)
    except ValueError as error:
        parser.error(str(error))
    return filled(PromptSampleSettings, vars(args))
