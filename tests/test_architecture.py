"""What docs/architecture.md draws, as tests: which way imports point, who may know what, how long
things may be."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests import laws
from tests.laws import ROOT, name_of

LIBRARY = sorted((ROOT / "coati").rglob("*.py"))
SCRIPTS = sorted((ROOT / "examples").rglob("*.py"))
PROGRAMS = sorted([*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "tools").rglob("*.py")])
TESTS = sorted((ROOT / "tests").rglob("*.py"))
DOCUMENTED = ("models", "trainer", "experience_maker", "parallel")

# law of tests/laws.py -> the files that it holds for
LAWS = {
    "long_lines": [*LIBRARY, *SCRIPTS, *PROGRAMS, *TESTS],
    "format_comments": [*LIBRARY, *SCRIPTS, *PROGRAMS, *TESTS],
    "long_files": [*LIBRARY, *SCRIPTS],
    "long_functions": [*LIBRARY, *SCRIPTS, *PROGRAMS],
    "paired_assignments": [*LIBRARY, *SCRIPTS, *PROGRAMS],
    "globals_by_name": [*LIBRARY, *SCRIPTS, *PROGRAMS],
    # Parsers, the checks of parsed flags and what flags of earlier releases become; everything else
    # has settings.
    "takes_namespace": [
        path
        for path in LIBRARY
        if path.parent.name != "cli" and not name_of(path).startswith("coati/legacy/flags")
    ],
    "no_docstring": [
        path for path in LIBRARY if path.relative_to(ROOT / "coati").parts[0] in DOCUMENTED
    ],
}
# Modules that import each other, one of them inside a function, and why they may
CLOSED_INSIDE_FUNCTIONS = []
# Stems that stand twice in the library: the reference has models/base.py and trainer/base.py
SAME_STEM = {"base"}

# Lowest first; a package may import those on earlier lines.
LAYERS = [
    {"utils"},
    {"models", "rewards", "dataset"},
    {"environments"},
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
    # weight_transfer.py: groups with processes that are no ranks of the run
    "torch.distributed": (
        "coati/parallel/",
        "coati/utils/distributed.py",
        "coati/experience_maker/rollouts/weight_transfer.py",
    ),
    "argparse": ("coati/cli/", "coati/legacy/flags"),
}
# Names that a parser offers live in modules that load in milliseconds.
LIGHT = [
    "coati",
    "coati.__main__",
    "coati.cli.arguments",
    "coati.cli.fit",
    "coati.cli.preferences",
    "coati.cli.rollouts",
    "coati.recipes.quick_start",
    "coati.legacy.flags_preferences",
    "coati.legacy.flags_rl",
    "coati.parallel.footprint.fitting",
    "coati.parallel.plugins",
    "coati.recipes.verbs.fit",
    "coati.legacy.strategies",
    "coati.models.policy_registry",
    "coati.models.quantization_registry",
    "coati.environments.environment_table",
    "coati.rewards.registry",
    "coati.rewards.scorer",
    "coati.rewards.source_sets",
    "coati.experience_maker.advantage_registry",
    "coati.experience_buffer.batch_sizes",
    "coati.utils.resources",
]
OLD_REWARDS = "coati.utils.reward_score"
HEAVY = ("torch", "transformers", "colossalai", "datasets", "peft", "numpy")


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
            found = [line for module, line in imports(path) if belongs_to(module, OLD_REWARDS)]
            assert not found, f"{name_of(path)}:{found}"


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


def breaches(law: str) -> dict[str, list[str]]:
    """What breaks ``law``, by file."""
    found = {name_of(path): list(getattr(laws, law)(path)) for path in LAWS[law]}
    return {name: lines for name, lines in found.items() if lines}


@pytest.mark.parametrize("law", LAWS)
def test_the_laws_of_the_code(law):
    found = breaches(law)
    assert not found, "\n".join(f"{name}:{line}" for name in found for line in found[name])


def test_the_formatter_has_nothing_to_do():
    program = [sys.executable, "-m", "ruff", "format", "--check", "--quiet", "."]
    run = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, f"run: ruff format\n{run.stdout}{run.stderr}"


@pytest.mark.parametrize("everywhere", [False, True], ids=["at the top", "inside functions too"])
def test_imports_close_no_circle(everywhere):
    graph = {}
    for path in LIBRARY:
        name = laws.module_of(path)
        graph[name] = laws.imported_modules(path, everywhere) - {name}
    assert laws.circles(graph) == (CLOSED_INSIDE_FUNCTIONS if everywhere else [])


def test_two_training_scripts_share_no_block():
    scripts = [path for path in SCRIPTS if path.parent.name == "training_scripts"]
    shared = laws.shared_blocks(scripts)
    assert not shared, "\n".join(shared)


def test_a_traceback_names_one_file():
    """No stem stands for two modules of the library, which a traceback or an editor's tab would not
    tell apart."""
    # A verb has the name of its parser or trainer, and its module is only the way to them.
    places = [path for path in LIBRARY if path.stem != "__init__" and path.parent.name != "verbs"]
    stems = Counter(path.stem for path in places)
    assert {stem for stem, count in stems.items() if count > 1} == SAME_STEM


def test_the_laws_see_what_breaks_them(tmp_path, monkeypatch):
    """Each law on a file that breaks it once, and on what only looks so."""
    monkeypatch.setattr(laws, "ROOT", tmp_path)

    def lines(law: str, text: str) -> list[str]:
        path = tmp_path / "file.py"
        path.write_text(text, encoding="utf-8")
        return [line.partition(":")[0] for line in getattr(laws, law)(path)]

    pairs = "a, b = 1, 2\na, b = b, a\na, b = f()\na = (1, 2)\nx.y, z = z, 0\na, *b = 1, *c\n"
    assert lines("paired_assignments", pairs) == ["1"]
    assert lines("long_lines", "a\n" + "x" * 101 + "\n" + "x" * 100) == ["2"]
    assert lines("format_comments", "a = 1  # fmt" + ": skip\n") == ["1"]
    assert lines("globals_by_name", "globals()['f']()\nlocals()['f']\n") == ["1"]
    assert lines("takes_namespace", "def f(args: Namespace): ...\ndef g(a: int): ...\n") == ["1"]
    assert lines("no_docstring", "def f(): ...\ndef _g(): ...\ndef h():\n    'h'\n") == ["1"]
    assert lines("long_functions", "def f():\n" + "    1\n" * 60) == ["1"]
    assert lines("long_files", "1\n" * 501) == ["501"]
    assert laws.circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    twice = "\n".join("abcdef")
    paths = [tmp_path / "one.py", tmp_path / "two.py", tmp_path / "three.py"]
    for path, text in zip(paths, (f"x\n{twice}\ny", f"z\n\n{twice}", twice[:-1]), strict=True):
        path.write_text(text, encoding="utf-8")
    assert laws.shared_blocks(paths) == ["one.py and two.py: a"]


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
