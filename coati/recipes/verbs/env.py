"""Print versions, devices and the precisions of each plugin."""

import json
from typing import Any

from coati.cli.this_machine import EnvSettings, env_parser, parse_env
from coati.cli.verb import Verb

VERB = Verb("machine", env_parser, parse_env, "coati.recipes.verbs.env:main")

# Of a run, not of the machine, and nobody's business in a bug report.
PRIVATE = ("command", "directory", "host")


def main(settings: EnvSettings) -> None:
    """Print them. What is missing is said with the command that installs it."""
    from coati.utils.environment import environment

    about = environment() | {"plugins": plugins(), "problems": problems()}
    found = {name: value for name, value in about.items() if name not in PRIVATE}
    if settings.json:
        print(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        for index, line in enumerate(_lines(value)):
            print(f"{'' if index else name:<12}{line}")


def plugins() -> dict[str, str]:
    """The precisions that each plugin takes on this machine."""
    import torch

    from coati.parallel.plugins import PLUGINS

    has_bf16 = not torch.cuda.is_available() or torch.cuda.is_bf16_supported()
    return {
        name: " ".join(one for one in row.precisions if has_bf16 or one != "bf16")
        for name, row in PLUGINS.items()
    }


def problems() -> list[str]:
    """What would keep a training from starting."""
    from coati.utils.packages import check_packages

    try:
        check_packages()
    except ValueError as error:
        return [str(error)]
    return []


def _lines(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [f"{name} {one}" for name, one in value.items()] or ["none"]
    if isinstance(value, list):
        return [str(one) for one in value] or ["none"]
    return [str(value)]
