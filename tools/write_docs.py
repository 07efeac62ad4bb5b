"""Writes what the code itself can say into docs/, so that the pages cannot differ from it.

docs/flags.md and docs/flags/ are written whole, from the parsers, and listed in mkdocs.yml and
docs/llms.txt; the plugin tables of docs/plugins.md, from PLUGINS and the checks; the tree of
docs/architecture.md, from the modules' first sentences; the reasons of docs/data.md, from
row_errors.py; the names of docs/migrate.md, from aliases.py; the schemas of coati/cli/schemas, from
the parsers; the table of examples/recipes/README.md, from the recipes; those of
benchmarks/README.md, from the programs; the memory table of docs/resources.md, from the built-in
models, and what each recipe takes.

python -m tools.write_docs            write them
python -m tools.write_docs --check    exit with code 1 when one of them is not current
"""

import argparse
import ast
import json
import re
import sys
from pathlib import Path

from coati.cli.config_file import schema_of
from coati.cli.nearest import SCHEMAS
from coati.dataset.rows.row_errors import CLEANING_REASONS, MALFORMED_REASONS, REASONS
from coati.parallel.footprint.fitting import memory_table
from coati.parallel.plugin_checks import check_options, resolve_options
from coati.parallel.plugins import PLUGINS, PRECISIONS, ParallelOptions
from coati.recipes.command import load, names
from coati.recipes.verbs.fit import markdown
from tools.alias_pages import alias_tables
from tools.bench_pages import bench_tables
from tools.flag_pages import DOCS, ROOT, flag_pages, llms_lines, nav_lines, strategy_table
from tools.recipe_pages import current_recipes, recipe_table

# As imports point: lower packages first.
FLOORS = (
    "utils",
    "models",
    "rewards",
    "dataset",
    "parallel",
    "experience_maker",
    "experience_buffer",
    "trainer",
    "inference",
    "cli",
    "recipes",
)
# Nobody keeps their flags in a file.
WITHOUT_CONFIG = ("bench", "cache", "completion", "env", "init")


def plugin_tables() -> str:
    """The tables of docs/plugins.md. What a plugin can do is asked of the same checks that refuse
    it to a user."""
    what = ["| plugin | what it shards | take it for |", "| --- | --- | --- |"]
    what += [f"| `{name}` | {row.shards} | {row.best_for} |" for name, row in PLUGINS.items()]
    asked = {precision: {"precision": precision} for precision in PRECISIONS} | {
        "LoRA": {"lora": True},
        "accumulation": {"accumulation_steps": 2},
        "`--tp`": {"tp": 2},
        "`--pp`": {"pp": 2},
        "`--sp`": {"sp": 2, "sp_mode": "all_to_all", "enable_sequence_parallelism": True},
    }
    can = [
        f"| plugin | {' | '.join(asked)} | generation | `--packing` |",
        "| --- " * (len(asked) + 3) + "|",
    ]
    for name, row in PLUGINS.items():
        cells = [*(_can(name, values) for values in asked.values()), row.generation, row.packing]
        can.append(f"| `{name}` | {' | '.join(cells)} |")
    cannot = ["| plugin | ColossalAI's class | cannot |", "| --- | --- | --- |"]
    cannot += [f"| `{name}` | `{row.upstream}` | {row.cannot} |" for name, row in PLUGINS.items()]
    return "\n".join([*what, "", *can, "", *cannot])


def _can(name: str, values: dict) -> str:
    values = {"precision": "bf16"} | values
    became = resolve_options(ParallelOptions(plugin=name, **values))[0].plugin
    try:
        check_options(name, **values)
    except ValueError:
        return "no"
    return "yes" if became == name else f"becomes `{became}`"


def tree() -> str:
    """Every package and module of the library with the first sentence of its docstring."""
    lines = ["```", "coati/"]
    for folder in sorted(
        (path.parent for path in (ROOT / "coati").glob("*/**/__init__.py")), key=_floor
    ):
        parts = folder.relative_to(ROOT / "coati").parts
        lines.append(
            f"{'  ' * len(parts) + parts[-1] + '/':<26}{_first_sentence(folder / '__init__.py')}"
        )
        modules = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
        lines += [
            f"{'  ' * (len(parts) + 1) + path.name:<26}{_first_sentence(path)}" for path in modules
        ]
    return "\n".join([*lines, "```"])


def _floor(folder: Path) -> tuple[int, str]:
    """Lower packages first; one that is not in the list stands at the end."""
    package = folder.relative_to(ROOT / "coati").parts[0]
    return FLOORS.index(package) if package in FLOORS else len(FLOORS), str(folder)


def _first_sentence(module: Path) -> str:
    text = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    sentence = re.split(r"\.(?:\s|$)", " ".join(text.split("\n\n")[0].split()), maxsplit=1)[0]
    return re.sub(r":\w+:`(\w+)`", r"\1", sentence).replace("``", "")


def reason_tables() -> str:
    """Why a preparation leaves rows out, by who has to do something about it."""
    others = MALFORMED_REASONS | CLEANING_REASONS
    unfit = {reason: meaning for reason, meaning in REASONS.items() if reason not in others}
    groups = {
        "Malformed: the file has to be corrected": MALFORMED_REASONS,
        "Unfit: `--max_length`, the template or the row itself is in the way": unfit,
        "Cleaned: left out because a flag asked for it": CLEANING_REASONS,
    }
    lines = []
    for title, reasons in groups.items():
        lines += [f"{title}.", "", "| reason | what it means |", "| --- | --- |"]
        lines += [*(f"| `{reason}` | {meaning} |" for reason, meaning in reasons.items()), ""]
    return "\n".join(lines[:-1])


def memory_part() -> str:
    """What the built-in models take for each method."""
    return markdown(memory_table())


PARTS = {
    "README.md": {"memory": memory_part},
    "docs/resources.md": {"memory": memory_part},
    "docs/plugins.md": {"plugins": plugin_tables, "strategies": strategy_table},
    "docs/architecture.md": {"tree": tree},
    "docs/data.md": {"reasons": reason_tables},
    "docs/migrate.md": {"aliases": alias_tables},
    "docs/llms.txt": {"flags": llms_lines},
    "mkdocs.yml": {"flags": nav_lines},
    "examples/recipes/README.md": {"recipes": recipe_table},
    "benchmarks/README.md": {"programs": bench_tables},
}


def pages() -> dict[Path, str]:
    """Each page that holds something generated, and its text as it should be."""
    made = flag_pages()
    for name, parts in PARTS.items():
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        for part, write in parts.items():
            text = _with_part(path, text, part, write())
        made[path] = text
    return made | schemas() | current_recipes()


def schemas() -> dict[Path, str]:
    """The JSON schema of each verb's YAML file."""
    return {
        SCHEMAS / f"{name}.json": json.dumps(schema_of(load(name).parser()), indent=1) + "\n"
        for name in names()
        if name not in WITHOUT_CONFIG
    }


def stray_pages() -> list[Path]:
    """Pages of docs/flags/ whose command is gone."""
    return sorted(set((DOCS / "flags").glob("*.md")) - set(flag_pages()))


def _with_part(path: Path, text: str, part: str, written: str) -> str:
    """``text`` with what stands between the two marks of ``part`` replaced."""
    begin = f"generated by make docs: {part}"
    if path.suffix == ".yml":
        begin = f"# {begin}\n"
        end = "          # end"
        gap = "\n"
    else:
        begin = f"<!-- {begin} -->\n"
        end = "<!-- end -->"
        gap = "\n\n"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(
            f"{path}: expected a part between {begin.strip()} and {end.strip()}, found none"
        )
    return f"{before}{begin}{gap[1:]}{written}{gap}{end}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the generated pages of docs/.")
    parser.add_argument(
        "--check", action="store_true", help="only say whether the pages are current"
    )
    check = parser.parse_args().check
    stale = 0
    for path in stray_pages():
        stale += 1
        if check:
            print(f"{path} belongs to no command; run: make docs")
        else:
            path.unlink()
            print(f"removed {path}")
    for path, text in pages().items():
        current = path.exists() and path.read_text(encoding="utf-8") == text
        stale += not current
        if check:
            print(f"{path} is current" if current else f"{path} is not current; run: make docs")
        elif not current:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
