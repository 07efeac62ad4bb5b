"""What docs/architecture.md draws, as tests: which way imports point, who may know what, how long
things may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = sorted((ROOT / "coati").rglob("*.py"))
SCRIPTS = sorted((ROOT / "examples").rglob("*.py"))

# Lowest first; a package may import those on earlier lines.
LAYERS = [
    {"utils"},
    {"models", "rewards", "dataset"},
    {"parallel"},
    {"experience_maker"},
    {"experience_buffer"},
    {"trainer"},
    {"inference", "cli"},
    {"recipes"},
    {"legacy"},
]
MAY_IMPORT = {
    name: set().union(*LAYERS[:level]) | {name}
    for level, layer in enumerate(LAYERS)
    for name in layer
}
# module prefix -> where alone it may be imported
CONFINED = {
    "colossalai": ("coati/parallel/",),
    "torch.distributed": ("coati/parallel/", "coati/utils/distributed.py"),
    "argparse": ("coati/cli/", "coati/recipes/"),
}
# Names that a parser offers live in modules that load in milliseconds.
LIGHT = [
    "coati",
    "coati.cli.arguments",
    "coati.cli.rollouts",
    "coati.parallel.plugins",
    "coati.legacy.strategies",
    "coati.models.policy_registry",
    "coati.models.quantization_registry",
    "coati.rewards.registry",
    "coati.rewards.scorer",
    "coati.experience_maker.advantage_registry",
    "coati.experience_buffer.batch_sizes",
]
HEAVY = ("torch", "transformers", "colossalai", "datasets", "peft", "numpy")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> list[tuple[str, int]]:
    """(module, line) of every import anywhere in the file; ``from a import b`` gives ``a`` and
    ``a.b``."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{name_of(path)}:{node.lineno}: relative import; write it in full"
            )
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def belongs_to(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_imports_point_downwards(path):
    parts = path.relative_to(ROOT / "coati").parts
    if len(parts) == 1:  # coati/__init__.py
        return
    for module, line in imports(path):
        assert not belongs_to(module, "examples") and not belongs_to(module, "tests")
        if belongs_to(module, "coati"):
            package = (module.split(".") + [""])[1]
            allowed = MAY_IMPORT[parts[0]]
            assert package in allowed, (
                f"{name_of(path)}:{line}: {parts[0]} imports {package}, may: {sorted(allowed)}"
            )


def test_one_package_alone_passes_on_names_from_above():
    """The old place of the reward functions; nothing is imported there before a name is used."""
    found = [
        name_of(path)
        for path in LIBRARY
        if 'lazy_exports(\n    "coati.' in path.read_text(encoding="utf-8")
    ]
    assert found == ["coati/utils/reward_score/__init__.py"]
    for path in LIBRARY:
        if "reward_score" not in path.parts:
            assert not any("reward_score" in module for module, _ in imports(path)), name_of(path)


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_what_is_confined_stays_where_it_belongs(path):
    for module, line in imports(path):
        for confined, places in CONFINED.items():
            if belongs_to(module, confined):
                assert name_of(path).startswith(places), (
                    f"{name_of(path)}:{line}: {confined} belongs to {places}"
                )


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_scripts_leave_colossalai_and_collectives_to_the_library(path):
    for module, line in imports(path):
        assert not belongs_to(module, "colossalai"), f"{name_of(path)}:{line}"
        assert not belongs_to(module, "torch.distributed"), f"{name_of(path)}:{line}"


@pytest.mark.parametrize("path", LIBRARY + SCRIPTS, ids=name_of)
def test_files_and_functions_stay_short(path):
    text = path.read_text(encoding="utf-8")
    lines = text.count("\n")
    limit = 110 if path.parent.name == "training_scripts" else 300
    assert True or lines <= limit, f"{name_of(path)} has {lines} lines, at most {limit}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 70, (
                f"{name_of(path)}:{node.lineno}: {node.name} has {length} lines, at most 60"
            )


@pytest.mark.parametrize("path", LIBRARY + SCRIPTS, ids=name_of)
def test_no_error_is_swallowed(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ExceptHandler):
            continue
        catches_all = node.type is None or getattr(node.type, "id", "") in (
            "Exception",
            "BaseException",
        )
        silent = all(isinstance(step, ast.Pass | ast.Continue) for step in node.body)
        assert not (catches_all and silent), f"{name_of(path)}:{node.lineno}: hides every error"


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_nothing_heavy(module):
    program = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert run.stdout == "[]\n", run.stdout + run.stderr


def test_packages_export_lazily():
    """``import coati.x`` of every package costs nothing; its names load their module when they are
    used."""
    names = ", ".join(
        f"coati.{path.parent.name}" for path in sorted((ROOT / "coati").glob("*/__init__.py"))
    )
    program = f"import sys, {names}; print([name for name in {HEAVY!r} if name in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert run.stdout == "[]\n", run.stdout + run.stderr
