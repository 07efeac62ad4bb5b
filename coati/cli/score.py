"""The flags of ``coati score``."""

from collections.abc import Sequence

from coati.cli.model_flags import (
    add_own_template_flag,
    add_template_args_flag,
    add_trust_flag,
)
from coati.cli.parser import Parser
from coati.cli.program_settings import ScoreSettings
from coati.cli.settings import filled
from coati.cli.values import add_count, add_text


def score_parser() -> Parser:
    """The parser of ``coati score``."""
    parser = Parser(
        prog="coati score",
        usage="%(prog)s --model_path MODEL --input FILE [FILE ...] [flags]",
        description="Scores rows of data files with a reward model: preference pairs, labeled "
        "responses, or conversations.",
    )
    add_text(
        parser,
        "--model_path",
        unit="MODEL",
        help="directory that coati rm wrote, or a checkpoint (required)",
    )
    parser.add_argument(
        "--input", nargs="+", default=[], metavar="FILE", help="files or folders of rows (required)"
    )
    add_text(
        parser,
        "--output",
        unit="FILE",
        help="file for one JSON object per row; default: standard output",
    )
    add_text(
        parser, "--histogram", unit="FILE", help="plot the distribution of the scores as a PNG"
    )
    add_count(parser, "--batch_size", default=16, unit="ROWS", help="sequences per forward pass")
    add_count(
        parser,
        "--max_length",
        default=2048,
        unit="TOKENS",
        least=2,
        help="longer rows are skipped and reported",
    )
    add_own_template_flag(parser)
    add_template_args_flag(parser)
    add_trust_flag(parser)
    return parser


def parse_score(argv: Sequence[str] | None = None, prog: str | None = None) -> ScoreSettings:
    """The checked flags. Exits with code 2 and one line naming a wrong flag."""
    parser = score_parser().named(prog)
    args = parser.parse_args(argv)
    if args.model_path is None:
        parser.error("--model_path is required: a directory that coati rm wrote")
    if not args.input:
        parser.error("--input is required: files or folders of rows to score")
    return filled(ScoreSettings, vars(args))
