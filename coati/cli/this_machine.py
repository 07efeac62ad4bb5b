"""The flags of the verbs about this machine: env, doctor, cache, bench and completion."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from coati.cli.bench_programs import ALL, USUAL, programs, table
from coati.cli.launch_flags import LaunchSettings
from coati.cli.parser import Parser
from coati.cli.settings import filled
from coati.cli.values import add_count, add_number, add_switch, add_text

SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class EnvSettings:
    """``coati env``."""

    json: bool


@dataclass(frozen=True)
class DoctorSettings:
    """``coati doctor``. ``launch``: the hosts, as a run would be given them."""

    launch: LaunchSettings
    save_dir: str | None
    json: bool


@dataclass(frozen=True)
class CacheSettings:
    """``coati cache``. ``older_than``: days."""

    clear: bool
    older_than: float


@dataclass(frozen=True)
class BenchSettings:
    """``coati bench``. ``names``: ``all`` are the usual ones."""

    names: list[str]
    list: bool
    output_dir: str


@dataclass(frozen=True)
class CompletionSettings:
    """``coati completion``."""

    shell: str


def env_parser() -> Parser:
    """The parser of ``coati env``."""
    parser = Parser(
        prog="coati env",
        description="Prints versions, devices and the precisions of each plugin, for bug reports.",
    )
    add_switch(parser, "--json", help="print it as JSON")
    return parser


def parse_env(argv: Sequence[str] | None = None, prog: str | None = None) -> EnvSettings:
    """The checked flags."""
    return filled(EnvSettings, vars(env_parser().named(prog).parse_args(argv)))


def doctor_parser() -> Parser:
    """The parser of ``coati doctor``."""
    parser = Parser(
        prog="coati doctor",
        description="Looks for what would keep a run from starting or going well: versions, "
        "devices, memory, disks, addresses, ports, clocks, and the speed between hosts, each with "
        "its remedy.",
    )
    add_text(
        parser,
        "--hostfile",
        unit="FILE",
        help="look at these hosts over ssh, and compare them; as of the training commands",
    )
    add_count(parser, "--nproc", help="processes that are to run on each host")
    add_text(
        parser,
        "--save_dir",
        help="directory that the run is to write to, which all hosts must share",
    )
    add_text(
        parser, "--master_addr", unit="ADDRESS", help="address of the first host, as for a run"
    )
    add_count(parser, "--master_port", unit="PORT", help="port of the first host, as for a run")
    add_switch(parser, "--json", help="print it as JSON")
    return parser


def parse_doctor(argv: Sequence[str] | None = None, prog: str | None = None) -> DoctorSettings:
    """The checked flags."""
    parser = doctor_parser().named(prog)
    args = parser.parse_args(argv)
    launch = LaunchSettings(args.nproc, args.hostfile, args.master_addr, args.master_port)
    try:
        launch.hosts  # noqa: B018 - reads the file
    except ValueError as error:
        parser.error(str(error))
    return DoctorSettings(launch, args.save_dir, args.json)


def cache_parser() -> Parser:
    """The parser of ``coati cache``."""
    parser = Parser(
        prog="coati cache",
        description="Lists what is kept of earlier runs and can be made again: raw files tokenized "
        "for training, log-probs of reference models. Together at most 20 GiB, or "
        "COATI_CACHE_GIB; what was used longest ago goes first.",
    )
    add_switch(parser, "--clear", help="delete what is listed and not in use")
    add_number(
        parser,
        "--older_than",
        default=0.0,
        unit="DAYS",
        help="only entries that were not used for DAYS days",
    )
    return parser


def parse_cache(argv: Sequence[str] | None = None, prog: str | None = None) -> CacheSettings:
    """The checked flags."""
    return filled(CacheSettings, vars(cache_parser().named(prog).parse_args(argv)))


def bench_parser() -> Parser:
    """The parser of ``coati bench``."""
    parser = Parser(
        prog="coati bench",
        usage="%(prog)s [NAME ...] [flags]",
        description="Measures speed and memory of this machine with the programs of benchmarks/; "
        "they belong to the source checkout.",
    )
    parser.add_argument(
        "--names",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"benchmarks to run; {ALL}: {' '.join(USUAL)}",
    )
    add_switch(parser, "--list", help="list all benchmarks with what each measures, and exit")
    parser.add_argument(
        "--output_dir",
        "--output",
        default="output/bench",
        metavar="DIR",
        help="directory for the results as JSON",
    )
    return parser


def parse_bench(argv: Sequence[str] | None = None, prog: str | None = None) -> BenchSettings:
    """The checked flags. Without a name the process ends with code 2, after the list of them."""
    parser = bench_parser().named(prog)
    settings = filled(BenchSettings, vars(parser.parse_args(argv)))
    if not (settings.names or settings.list) and programs():
        print(f"usage: {parser.prog} [NAME ...] [flags]\n\n{table()}\n", file=sys.stderr)
        parser.error(f"name what to run; {ALL}, which takes long, runs {', '.join(USUAL)}")
    return settings


def completion_parser() -> Parser:
    """The parser of ``coati completion``."""
    parser = Parser(
        prog="coati completion",
        usage="%(prog)s {bash,zsh,fish}",
        description="Prints a completion script of verbs, flags and values for a shell.",
    )
    parser.add_argument("--shell", choices=SHELLS, help="the shell (required)")
    return parser


def parse_completion(
    argv: Sequence[str] | None = None, prog: str | None = None
) -> CompletionSettings:
    """The checked flags."""
    parser = completion_parser().named(prog)
    args = parser.parse_args(argv)
    if args.shell is None:
        parser.error(f"name the shell: coati completion {'|'.join(SHELLS)}")
    return CompletionSettings(args.shell)
