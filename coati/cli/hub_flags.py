"""``--push_to_hub``: where a finished model is uploaded."""

import argparse
import re

from coati.cli.values import add_text

# As the hub has it: letters, digits, - _ . of up to 96, no -- or .., neither at an end.
_NAME = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?", re.ASCII)


def add_hub_flag(group: argparse._ActionsContainer, what: str) -> None:
    """``what`` is uploaded, for the help."""
    add_text(
        group,
        "--push_to_hub",
        unit="OWNER/NAME",
        help=f"upload {what} to this repository of the Hugging Face hub, a new one being private; "
        "what is uploaded is said before; default: nothing is",
    )


def check_hub_id(name: str | None) -> None:
    """Raise ValueError for what is no ``owner/name``."""
    if name is None:
        return
    owner, _, rest = name.partition("/")
    if not (_NAME.fullmatch(owner) and _NAME.fullmatch(rest)):
        raise ValueError(
            f"--push_to_hub {name}: expected OWNER/NAME, a repository of the hub (letters, digits, "
            "- _ and .)"
        )
