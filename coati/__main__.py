"""The command ``coati``, also as ``python -m coati``."""

import sys
from collections.abc import Sequence

from coati import __version__
from coati.cli.verb import GROUPS
from coati.recipes.command import PROGRAM, load, names, run, summary


def overview() -> str:
    """What ``coati --help`` prints."""
    loaded = {name: load(name) for name in names()}
    lines = [
        f"usage: {PROGRAM} VERB [CONFIG.yaml] [--flag value ...]",
        "",
        "Aligns chat models with human feedback. `coati VERB --help` lists the flags of a verb,",
        "`coati init VERB` writes them into a YAML file, with their defaults.",
    ]
    for group, title in GROUPS.items():
        members = [name for name, verb in loaded.items() if verb.group == group]
        lines += ["", f"{title}:", *(f"  {name:<16}{summary(name)}" for name in members)]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """The command: ``argv`` is a verb and its flags. Ends the process unless the verb ran."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return
    if words[0] in ("-V", "--version"):
        print(f"{PROGRAM} {__version__}")
        return
    try:
        load(words[0])
    except ValueError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        sys.exit(2)
    run(words[0], words[1:], prog=f"{PROGRAM} {words[0]}")


if __name__ == "__main__":
    main()
