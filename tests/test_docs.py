"""What README and docs/ say must be there: links, files, make targets and flags; and they claim no
measured figures."""

import ast
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from coati.cli.parser import Parser
from coati.legacy.flags import QUANTIZED, SHARED
from coati.legacy.flags_preferences import PREFERENCES
from coati.legacy.flags_rl import ROLLOUTS
from coati.recipes.command import load, names

ROOT = Path(__file__).parent.parent
# The flags of earlier releases that a script takes.
OLDER = {
    "train_sft.py": SHARED,
    **dict.fromkeys(("train_rm.py", "train_dpo.py", "train_orpo.py", "train_kto.py"), PREFERENCES),
    **dict.fromkeys(("train_ppo.py", "train_grpo.py"), ROLLOUTS),
    **dict.fromkeys(("inference.py", "server.py", "benchmark.py"), QUANTIZED),
}
PAGES = [
    *sorted(ROOT.glob("*.md")),
    ROOT / "docker" / "README.md",
    ROOT / "examples" / "data" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
WRITTEN = [
    page for page in PAGES if page.name not in ("flags.md", "models.md")
]  # those two are generated whole

# Flags of other programs, by the program that has them.
OTHERS = {
    "colossalai run": {
        "--nproc_per_node",
        "--hostfile",
        "--master_port",
        "--master_addr",
        "--ssh-port",
        "--num_nodes",
        "--include",
        "--exclude",
        "--extra_launch_args",
    },
    "torchrun": {"--nnodes", "--rdzv-backend", "--rdzv-id", "--rdzv-endpoint"},
    "sbatch": {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task"},
    "docker": {"--ipc", "--build-arg", "--rm", "--user", "--gpus"},
    "pip": {"--no-deps", "--no-build-isolation"},
    "vllm serve": {"--served-model-name", "--max-model-len"},
    "sglang.launch_server": {"--model-path", "--served-model-name"},
    "tools.write_docs": {"--check"},
}
# What a benchmark prints on one machine is not true of another; pages name the command instead.
FIGURES = re.compile(
    r"\d[\d.,]*\s?(?:tokens/s|rows/s|%|percent|seconds?\b|s\b|ms\b|minutes?\b|hours?\b|"
    r"x (?:faster|less)|times faster)"
)
MACHINE_PATHS = re.compile(r"(?<![\w.])/(?:tmp|home|root|Users|mnt)/\w+")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def text_of(page: Path) -> str:
    """What a page says of today's code: without the diffs of docs/extending.md."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^```diff.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def slug(heading: str) -> str:
    """The anchor that a heading gets on GitHub."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text(encoding="utf-8"))):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        goal = (page.parent / path).resolve() if path else page
        assert goal.exists(), f"{name_of(page)} links to {target}"
        if anchor:
            headings = re.findall(
                r"^#+ (.+)$", prose(goal.read_text(encoding="utf-8")), re.MULTILINE
            )
            assert anchor in map(slug, headings), f"{name_of(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags_exist(page):
    known = set().union(*OTHERS.values())
    for parser in parsers_of_scripts().values():
        known |= set(parser._option_string_actions)  # those of older documents too
    text = text_of(page)
    unknown = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", text)) - known
    assert not unknown, f"{name_of(page)} names {sorted(unknown)}"


@cache
def verbs_of_scripts() -> dict[str, str]:
    """The verb that each script of examples/ runs, by the script's name."""
    found = {}
    for path in (ROOT / "examples").rglob("*.py"):
        if ran := re.search(
            r'^    run\("([a-z-]+)"', path.read_text(encoding="utf-8"), re.MULTILINE
        ):
            found[path.name] = ran[1]
    return found


def parsers_of_scripts() -> dict[str, Parser]:
    """The parser of every script, as the script calls it, and of every verb."""
    made = {name: load(verb).parser() for name, verb in verbs_of_scripts().items()}
    for name, older in OLDER.items():
        older.add(made[name])
    return made | {name: load(name).parser() for name in names()}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_accepted(page):
    """Each line in a code block that starts the command or one of the scripts is what the parser
    takes."""
    scripts = parsers_of_scripts()
    blocks = re.findall(
        r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        command = re.match(r"\s*(?:[A-Z_]+=\S+ )*coati [a-z]", line)
        words = shlex.split(line, comments=True) if ".py --" in line or command else []
        for index, word in enumerate(words):
            given = [rest for rest in words[index + 1 :] if rest != "..."]
            if Path(word).name in verbs_of_scripts():
                scripts[Path(word).name].parse_args(given)
            elif index and words[index - 1] == "coati" and word in scripts:
                scripts[word].parse_args(without_config(load(word).words(given)))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_make_targets_exist(page):
    text = text_of(page)
    folders = "coati|examples|config|benchmarks|tests|tools|docs"
    for path in re.findall(
        rf"(?<![\w/.])((?:{folders})/[\w./-]+\.(?:py|sh|json|jsonl|md|example))\b", text
    ):
        assert (ROOT / path).exists(), f"{name_of(page)} names {path}"
    targets = set(
        re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    named = set(re.findall(r"(?:`|^)make ([a-z][a-z-]*)", text, re.MULTILINE))
    assert named <= targets, f"{name_of(page)} names make {sorted(named - targets)}"


def without_config(words: list[str]) -> list[str]:
    """``words`` without the YAML file that they name, which is not there."""
    if "--config" not in words:
        return words
    place = words.index("--config")
    return words[:place] + words[place + 2 :]


def names_in(file: Path) -> set[str]:
    """Functions, classes, methods and variables of a module, methods as ``Class.method``."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{each.name}" for each in node.body if hasattr(each, "name")}
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign):
            found.add(node.target.id)
        else:
            found.add(getattr(node, "name", ""))
    return found


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_places_in_the_code_exist(page):
    """`folder/file.py`, below the root or coati/, and `folder/file.py:name` in it."""
    text = text_of(page)
    for path, name in re.findall(r"`((?:\w+/)+\w+\.py)(?::([\w.]+))?`", text):
        file = next((f for f in (ROOT / "coati" / path, ROOT / path) if f.exists()), None)
        assert file, f"{name_of(page)} names {path}"
        assert not name or name in names_in(file), f"{name_of(page)} names {path}:{name}"


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_no_figures_that_no_command_prints(page):
    text = prose(page.read_text(encoding="utf-8"))
    assert not (found := FIGURES.findall(text)), f"{name_of(page)}: {found}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_name_no_path_of_somebodys_machine(page):
    text = page.read_text(encoding="utf-8")
    assert not (found := MACHINE_PATHS.findall(text)), f"{name_of(page)}: {found}"


def test_architecture_stays_short():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert len(prose(text).splitlines()) <= 150
