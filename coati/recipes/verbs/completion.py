"""Print a completion script for bash, zsh or fish."""

from coati.cli.this_machine import CompletionSettings, completion_parser, parse_completion
from coati.cli.verb import Verb

VERB = Verb(
    "machine",
    completion_parser,
    parse_completion,
    "coati.recipes.verbs.completion:main",
    subject="--shell",
)


def main(settings: CompletionSettings) -> None:
    """Print it; its first line says where it belongs."""
    from coati.cli.shell_completion import completion_script
    from coati.recipes.command import load, names, summary

    parsers = {name: load(name).parser() for name in names()}
    about = {name: summary(name) for name in parsers}
    print(completion_script(settings.shell, parsers, about), end="")
