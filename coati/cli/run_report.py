"""The flags of ``coati report``."""

from collections.abc import Sequence

from coati.cli.checks import checked
from coati.cli.parser import OlderFlags, Parser
from coati.cli.program_settings import ReportSettings
from coati.cli.settings import filled
from coati.cli.values import add_text


def report_parser() -> Parser:
    """The parser of ``coati report``."""
    parser = Parser(
        prog="coati report",
        usage="%(prog)s --run_dir DIR [DIR ...] [flags]",
        description="Writes the report of a training run from the files in its --save_dir, or one "
        "page that lays several runs side by side.",
    )
    parser.add_argument(
        "--run_dir",
        nargs="+",
        default=[],
        metavar="DIR",
        help="--save_dir of a run; several are laid side by side (required)",
    )
    add_text(
        parser,
        "--output",
        unit="FILE",
        help="file for the page; default: report.html in the run's directory, of several runs "
        "report.html in the working directory",
    )
    return parser


def parse_report(
    argv: Sequence[str] | None = None,
    older: OlderFlags | None = None,
    prog: str | None = None,
) -> ReportSettings:
    """The checked flags. Exits with code 2 and one line naming a wrong flag."""
    parser = report_parser().named(prog)
    args = checked(parser, argv, older=older)
    if not args.run_dir:
        parser.error("--run_dir is required: the --save_dir of a run, or of several")
    return filled(ReportSettings, vars(args))
