"""The recipes of examples/recipes as their first lines describe them, and the table of them."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from coati.cli.nearest import SCHEMAS
from coati.parallel.footprint.model_shape import load_shape
from coati.parallel.footprint.training_memory import Estimate, estimate
from coati.parallel.plugin_checks import resolve_options
from coati.recipes.command import load
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


def memory_of(recipe: Recipe) -> Estimate:
    """What a GPU of the recipe's run holds, whose rows are as long as it allows."""
    from coati.recipes.memory_plan import plan_of

    settings = load(recipe.verb).parse(["--config", str(recipe.path)])
    asked = settings.parallel
    options, _ = resolve_options(
        replace(asked, plugin=settings.plugin or "zero2", precision=asked.precision or "bf16")
    )
    response = settings.rollout.max_seq_len if hasattr(settings, "rollout") else 0
    plan = plan_of(
        settings,
        options,
        processes=recipe.processes,
        on_gpu=True,
        longest=settings.data.max_length - response,
    )
    return estimate(load_shape(recipe.flags["pretrain"]), plan)


def memory_line(recipe: Recipe) -> str:
    """The estimate in a line: the peak, and the parts that are at least a twentieth of it."""
    guess = memory_of(recipe)
    parts = sorted(guess.parts.items(), key=lambda part: -part[1])
    named = [f"{name} {size / 2**30:.1f}" for name, size in parts if size >= guess.peak / 20]
    of_each = " of each GPU" if recipe.processes > 1 else ""
    return f"{guess.peak / 2**30:.1f} GiB{of_each}, estimated: {', '.join(named)}"


def current_recipes() -> dict[Path, str]:
    """Each recipe with its estimate as it should be."""
    return {
        path: with_memory(path.read_text(encoding="utf-8"), memory_line(read_recipe(path)))
        for path in sorted(RECIPES.glob("*.yaml"))
    }


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
