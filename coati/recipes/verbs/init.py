"""Write a commented YAML file of all flags of a verb."""

import sys
from pathlib import Path

from coati.cli.config_file import REQUIRED, config_text
from coati.cli.init import InitSettings, init_parser, parse_init
from coati.cli.nearest import SCHEMAS
from coati.cli.verb import Verb

VERB = Verb("machine", init_parser, parse_init, "coati.recipes.verbs.init:main", subject="--verb")


def main(settings: InitSettings) -> None:
    """Write it, or print it (``--output -``). Raises ValueError for a verb that is not there and a
    file that is."""
    from coati.recipes.command import load

    verb = load(settings.verb)
    parser = verb.parser().named(f"coati init {settings.verb}")
    given = vars(parser.parse_args(settings.given))
    schema = SCHEMAS / f"{settings.verb}.json"
    text = config_text(parser, settings.verb, given, schema if schema.exists() else None)
    if settings.output == "-":
        sys.stdout.write(text)
        return
    path = Path(settings.output)
    if path.exists():
        raise ValueError(f"{path} exists already; name another file with --output, or remove it")
    path.write_text(text, encoding="utf-8")
    missing = [
        action.dest
        for action in parser.documented()
        if REQUIRED in (action.help or "") and not given.get(action.dest)
    ]
    fill = f"fill in {' and '.join(missing)}, then: " if missing else "run it: "
    print(f"wrote {path}; {fill}coati {settings.verb} {path}")
