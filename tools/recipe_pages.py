"""The recipes of examples/recipes as their first lines describe them, and the table of them."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from coati.cli.config_file import SCHEMAS
from tools.flag_pages import ROOT

RECIPES = ROOT / "examples" / "recipes"
_MEMORY = re.compile(r"^# Memory:.*$", re.MULTILINE)


@dataclass(frozen=True)
class Recipe:
    """A file of :data:`RECIPES`. ``memory``: its estimate, "" where there is none yet; ``flags``:
    the values of its keys, as YAML reads them."""

    path: Path
    title: str
    command: str
    hardware: str
    memory: str
    flags: dict[str, Any]

    @property
    def verb(self) -> str:
        """Of ``coati VERB``."""
        return self.command.split()[1]

    @property
    def method(self) -> str:
        """As the table calls it: the verb, and whether adapters are trained."""
        return f"{self.verb}, LoRA" if self.flags.get("lora_rank") else self.verb

    @property
    def processes(self) -> int:
        """That the recipe starts."""
        return self.flags.get("nproc", 1)


def read_recipe(path: Path) -> Recipe:
    """Raises ValueError for a file that does not begin as recipes do."""
    text = path.read_text(encoding="utf-8")
    found = {
        name: re.search(rf"^# {name}: *(.*)$", text, re.MULTILINE)
        for name in ("Run", "Hardware", "Memory")
    }
    title = re.match(r"# yaml-language-server: \$schema=(\S+)\n# (.+)\n", text)
    if title is None or None in found.values():
        raise ValueError(
            f"{path}: expected a line with the schema, one about the recipe, and # Run:, "
            f"# Hardware: and # Memory: among its first lines"
        )
    lines = {name: match[1] for name, match in found.items() if match is not None}
    recipe = Recipe(
        path, title[2], lines["Run"], lines["Hardware"], lines["Memory"], yaml.safe_load(text)
    )
    schema = (path.parent / title[1]).resolve()
    if schema != SCHEMAS.resolve() / f"{recipe.verb}.json":
        raise ValueError(f"{path}: its schema is {title[1]}, its command coati {recipe.verb}")
    return recipe


def with_memory(text: str, memory: str) -> str:
    """The ``text`` of a recipe with ``memory`` as its estimate."""
    return _MEMORY.sub(lambda _: f"# Memory:   {memory}", text, count=1)


def recipe_table() -> str:
    """The table of examples/recipes/README.md: a line for each file, by model."""
    lines = ["| file | model | method | hardware | command |", "| --- | --- | --- | --- | --- |"]
    for path in sorted(RECIPES.glob("*.yaml")):
        recipe = read_recipe(path)
        lines.append(
            f"| [{path.name}]({path.name}) | {recipe.flags['pretrain']} | {recipe.method} "
            f"| {recipe.hardware} | `{recipe.command}` |"
        )
    return "\n".join(lines)
