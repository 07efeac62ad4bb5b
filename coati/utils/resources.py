"""The files that come with coati: conversation templates, recipes, a LoRA configuration and a
hostfile. A checkout has them in config/ and examples/recipes/, the wheel inside the package."""

import difflib
import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def resource_root() -> Path:
    """The folder that holds ``config`` and ``examples/recipes``: the installed package, or the
    checkout around it."""
    return _PACKAGE if (_PACKAGE / "config").is_dir() else _PACKAGE.parent


def config_path(name: str) -> Path:
    """A file of ``config``: ``lora_config.json`` or ``hostfile.example``. Raises ValueError naming
    those that are there."""
    folder = resource_root() / "config"
    if not (folder / name).is_file():
        there = sorted(path.name for path in folder.iterdir() if path.is_file())
        raise ValueError(f"{name}: no such configuration; coati has {', '.join(there)}")
    return folder / name


def templates() -> dict[str, Path]:
    """The conversation templates by name, ``owner_model`` as a rule."""
    folder = resource_root() / "config" / "conversation_template"
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def recipes() -> dict[str, Path]:
    """The recipes by name: the path below ``examples/recipes`` without its ending."""
    folder = resource_root() / "examples" / "recipes"
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in sorted(folder.rglob("*.yaml"))
    }


def recipe_path(given: str | os.PathLike) -> Path | None:
    """The recipe that the name of a configuration means where no file has that name: with or
    without its ending or ``examples/recipes/``. None where it means no recipe."""
    if Path(given).exists():
        return None
    name = Path(given).as_posix().removeprefix("examples/recipes/").removesuffix(".yaml")
    return recipes().get(name)


def near_recipes(given: str | os.PathLike) -> list[str]:
    """The recipes with the names most like ``given``."""
    return difflib.get_close_matches(Path(given).name.removesuffix(".yaml"), recipes(), n=3)


def template_path(given: str | os.PathLike, may_be_new: bool = False) -> Path:
    """The file that ``--conversation_template_config`` means: a file, or the template of that
    name, which may be written as the hub does (``google/gemma-3-4b-it``).

    What ends in .json is a file, never a name; with ``may_be_new`` it need not be there yet. Raises
    ValueError, which begins with ``given``, when nothing is found; it lists near names.
    """
    path = Path(given)
    if path.is_file() or (may_be_new and path.suffix == ".json" and not path.exists()):
        return path
    there = templates()
    name = str(given).replace("/", "_").casefold()
    for known, file in there.items():
        if known.casefold() == name:
            return file
    found = "is a directory" if path.is_dir() else "no such file"
    raise ValueError(
        f"{given}: {found}, and no conversation template of that name comes with coati; "
        f"{_near(path.stem if path.suffix == '.json' else name, there)}"
    )


def _near(name: str, there: dict[str, Path]) -> str:
    """The names most like ``name``, else all."""
    folded = {known.casefold(): known for known in there}
    near = difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(folded[one] for one in near)}?"
    return f"expected a JSON file or one of {', '.join(there)}"
