"""The flags of ``coati init``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from coati.cli.parser import Parser
from coati.cli.values import add_text


@dataclass(frozen=True)
class InitSettings:
    """``coati init``. ``given``: further words, flags of the verb."""

    verb: str
    output: str
    given: list[str]


def init_parser() -> Parser:
    """The parser of ``coati init``."""
    parser = Parser(
        prog="coati init",
        usage="%(prog)s VERB [--output FILE] [--flag value ...]",
        description="Writes a commented YAML file of all flags of a verb, with their defaults; "
        "flags of the verb fill in values.",
    )
    add_text(parser, "--verb", unit="VERB", help="the verb that the file is for (required)")
    add_text(
        parser,
        "--output",
        unit="FILE",
        help="file to write, -: standard output; must not exist yet; default: VERB.yaml",
    )
    return parser


def parse_init(argv: Sequence[str] | None = None, prog: str | None = None) -> InitSettings:
    """The checked flags; those that are not its own are the verb's."""
    parser = init_parser().named(prog)
    own, rest = _split(list(argv or []))
    args = parser.parse_args(own)
    if args.verb is None:
        parser.error("name the verb that the file is for: coati init sft")
    return InitSettings(args.verb, args.output or f"{args.verb}.yaml", rest)


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """Its own flags with their value, and all other words."""
    own: list[Any] = []
    rest: list[Any] = []
    target = rest
    for word in words:
        if word.startswith("-") and word != "-":
            name = word.partition("=")[0]
            target = own if name in ("--verb", "--output", "-h", "--help") else rest
        target.append(word)
    return own, rest
