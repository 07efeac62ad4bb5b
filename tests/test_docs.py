"""What README and docs/ say must be there: links, files, make targets and flags; and they claim no
measured figures."""

import ast
import functools
import re
import shlex
from pathlib import Path

import pytest
import yaml

from coati.cli.parser import Parser
from coati.experience_maker.advantage_registry import GROUP_METHODS
from coati.legacy.flags import QUANTIZED, SHARED
from coati.legacy.flags_preferences import PREFERENCES
from coati.legacy.flags_rl import ROLLOUTS
from coati.models.loss_registry import LOSS_TYPES, REWARD_LOSSES
from coati.models.policy_registry import KL_ESTIMATORS, LOSS_AGG_MODES, POLICY_LOSSES
from coati.models.quantization_registry import METHODS, QUANTS
from coati.recipes.command import load
from tools.flag_pages import SCRIPTS, parsers_by_verb

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# The flags of earlier releases that a command takes.
OLDER = {
    **dict.fromkeys(("sft", "pretrain", "gkd", "ilql", "online-dpo"), SHARED),
    **dict.fromkeys(("rm", "dpo", "orpo", "kto"), PREFERENCES),
    **dict.fromkeys(("ppo", "grpo"), ROLLOUTS),
    **dict.fromkeys(("chat", "serve", "measure"), QUANTIZED),
}
SITE_PAGES = sorted(DOCS.rglob("*.md"))
PAGES = [
    *sorted(ROOT.glob("*.md")),
    ROOT / "docker" / "README.md",
    ROOT / "examples" / "data" / "README.md",
    ROOT / "examples" / "recipes" / "README.md",
    *SITE_PAGES,
]
WRITTEN = [  # flags and models are generated whole
    page
    for page in PAGES
    if page.name not in ("flags.md", "models.md") and page.parent.name != "flags"
]

# Flags of other programs, by the program that has them.
OTHERS = {
    "benchmarks/*.py": {
        "--algorithm",
        "--batches",
        "--before",
        "--cases",
        "--interface",
        "--only",
        "--picture",
        "--rounds",
        "--rows",
        "--shape",
        "--steps",
    },
    "tools/cuda_wheels.py": {"--bitsandbytes", "--python-version"},
    "pip install, where there is no registry": {"--no-index", "--target"},
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
    "torchrun": {
        "--nnodes",
        "--local-addr",
        "--max-restarts",
        "--rdzv-backend",
        "--rdzv-conf",
        "--rdzv-id",
        "--rdzv-endpoint",
    },
    "sbatch": {
        "--nodes",
        "--ntasks-per-node",
        "--gpus-per-node",
        "--cpus-per-task",
        "--requeue",
        "--open-mode",
    },
    "srun": {"--overlap"},
    "ray start": {"--address", "--block", "--head", "--num-gpus", "--object-store-memory"},
    "docker": {"--build-arg", "--gpus", "--ipc", "--rm", "--user"},
    "pip": {"--no-build-isolation", "--no-deps"},
    "vllm serve": {"--served-model-name", "--max-model-len", "--max-num-seqs", "--api-key"},
    "tools/venv.py": {"--cpu"},
    "sglang.launch_server": {"--model-path", "--served-model-name"},
    "tools.write_docs": {"--check"},
}
EXAMPLE_VERBS = {"rwr"}  # that of docs/extending.md, which its test runs
# What a benchmark prints on one machine is not true of another; a page names the command beside it.
FIGURES = re.compile(
    r"\d[\d.,]*\s?(?:tokens/s|rows/s|%|percent|seconds?\b|s\b|ms\b|minutes?\b|hours?\b|"
    r"x\b(?! \d)|times faster)"
)
COMMAND = re.compile(r"`(?:make [a-z]|python |coati [a-z])")
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


def anchors(page: Path) -> set[str]:
    """What a link to ``page`` may name behind its #: headings, and the objects of an API page."""
    text = prose(page.read_text(encoding="utf-8"))
    headings = map(slug, re.findall(r"^#+ (.+)$", text, re.MULTILINE))
    return {*headings, *re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)}


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
        assert not anchor or anchor in anchors(goal), f"{name_of(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags_exist(page):
    known = set().union(*OTHERS.values())
    for parser in commands().values():
        known |= set(parser._option_string_actions)  # those of older documents too
    text = text_of(page)
    unknown = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", text)) - known
    assert not unknown, f"{name_of(page)} names {sorted(unknown)}"


@functools.cache
def commands() -> dict[str, Parser]:
    """Every parser by its VERB, as ``coati VERB`` and the script call it."""
    made = parsers_by_verb()
    for verb, older in OLDER.items():
        older.add(made[verb])
    return made


def called(line: str) -> tuple[str, list[str]] | None:
    """The VERB that a line of a code block calls, by its name or its script, and its flags in
    full, file names aside; None for another program."""
    if not re.match(r"\s*(?:[A-Z_]+=\S+ )*coati ", line) and ".py --" not in line:
        return None
    verbs = {Path(script).name: verb for verb, script in SCRIPTS.items()}
    words = [word for word in shlex.split(line, comments=True) if word != "..."]
    for index, word in enumerate(words):
        if Path(word).name in verbs:
            return verbs[Path(word).name], words[index + 1 :]
        if word == "coati" and words[index + 1 : index + 2] and words[index + 1] in commands():
            return words[index + 1], spelled_out(words[index + 1], words[index + 2 :])
    return None


def spelled_out(verb: str, words: list[str]) -> list[str]:
    """Words behind ``coati VERB`` as its parser takes them, without the file of ``--config``, which
    is not there."""
    words = load(verb).words(words)
    if "--config" in words:
        place = words.index("--config")
        words = words[:place] + words[place + 2 :]
    return words


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_accepted(page):
    """Each line in a code block that calls a command or a script is what its parser takes."""
    blocks = re.findall(
        r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        if found := called(line):
            verb, words = found
            if verb == "init":  # its further words are flags of the verb that it names
                verb, words = words[1], words[2:]
            commands()[verb].parse_args(words)


def test_commands_are_recognized():
    assert called("python examples/training_scripts/train_sft.py --lr 1 ...") == (
        "sft",
        ["--lr", "1"],
    )
    assert called("coati dpo dpo.yaml --nproc 4 --lr 1  # slow") == (
        "dpo",
        ["--nproc", "4", "--lr", "1"],
    )
    assert called("CUDA_VISIBLE_DEVICES=1 coati chat out/sft --quant 4bit") == (
        "chat",
        ["--model_path", "out/sft", "--quant", "4bit"],
    )
    assert called("coati: --packing: 300 rows") is None
    assert called("coati sft out/sft --lr 1") == ("sft", ["out/sft", "--lr", "1"])  # refused


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_commands_exist(page):
    text = text_of(page)
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    named = set(re.findall(r"`coati ([a-z][\w-]*)", prose(text)))
    named |= set(re.findall(r"^coati ([a-z][\w-]*)", blocks, re.MULTILINE))
    unknown = named - set(commands()) - EXAMPLE_VERBS
    assert not unknown, f"{name_of(page)} names {sorted(unknown)}"


def nav_of(entry) -> list[str]:
    """The pages below an entry of mkdocs.yml's nav."""
    if isinstance(entry, str):
        return [entry]
    children = entry.values() if isinstance(entry, dict) else entry
    return [page for child in children for page in nav_of(child)]


def test_the_navigation_and_the_index_for_machines_list_every_page():
    class Loader(yaml.SafeLoader):
        """mkdocs.yml has tags of its own: !ENV, and a function to call."""

    Loader.add_multi_constructor("", lambda loader, suffix, node: None)
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)
    pages = sorted(page.relative_to(DOCS).as_posix() for page in SITE_PAGES)
    assert sorted(nav_of(config["nav"])) == pages
    lines = (DOCS / "llms.txt").read_text(encoding="utf-8").splitlines()
    listed = [re.fullmatch(r"- \[[^\]]+\]\(([\w./-]+)\): .+", x) for x in lines if x[:1] == "-"]
    assert sorted(entry[1] for entry in listed) == pages


def test_papers_name_every_registered_method():
    text = (DOCS / "papers.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([^`]+)`", text))
    registries = (LOSS_TYPES, REWARD_LOSSES, KL_ESTIMATORS, LOSS_AGG_MODES, GROUP_METHODS, METHODS)
    registries += (POLICY_LOSSES,)
    methods = {name for registry in (*registries, QUANTS) for name in registry}
    assert methods <= named, sorted(methods - named)


def test_papers_say_of_each_function_what_it_says_itself():
    """A paper that a row names stands in the docstring of its function, or in the registry; and
    so does its equation."""
    registered = " ".join(
        row.about for registry in (LOSS_TYPES, GROUP_METHODS) for row in registry.values()
    )
    text = (DOCS / "papers.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"arXiv (\S+) \|(?: (\d*) \|)? `([\w/]+\.py):(\w+)`", text.split("## Models, memory")[0]
    )
    assert len(rows) > 20
    for paper, equation, path, name in rows:
        said = docstring_of(ROOT / "coati" / path, name) + registered
        assert paper in said, f"{path}:{name} does not name {paper}"
        if equation:
            assert f"eq. {equation}" in said, f"{path}:{name} does not name eq. {equation}"


def docstring_of(file: Path, name: str) -> str:
    """The docstrings of a function or class and of its module, in one line."""
    module = ast.parse(file.read_text(encoding="utf-8"))
    node = next(node for node in module.body if getattr(node, "name", "") == name)
    return " ".join(f"{ast.get_docstring(node)} {ast.get_docstring(module)}".split())


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
    assert not (found := figures_alone(text)), f"{name_of(page)}: {found}"


def figures_alone(text: str) -> list[str]:
    """Measured figures without the command that prints them: in their own row of a table, in their
    paragraph, or in the one before a table."""
    found = []
    before = ""
    for block in re.split(r"\n\s*\n", text):
        table = block.lstrip().startswith("|")
        places = block.splitlines() if table else [block]
        introduced = table and COMMAND.search(before)
        for place in places:
            if not introduced and not COMMAND.search(place):
                found += FIGURES.findall(place)
        before = block
    return found


def test_a_figure_needs_its_command():
    assert figures_alone("It makes 300 tokens/s.") == ["300 tokens/s"]
    assert figures_alone("`make bench` prints 300 tokens/s.") == []
    assert figures_alone("`make bench` prints it.\n\nIt makes 300 tokens/s.") == ["300 tokens/s"]
    table = "| a | b |\n| --- | --- |\n| 5 x | `coati bench` |\n| 6 x | |"
    assert figures_alone(table) == ["6 x"]
    assert figures_alone(f"`make bench` prints\n\n{table}") == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_name_no_path_of_somebodys_machine(page):
    text = page.read_text(encoding="utf-8")
    assert not (found := MACHINE_PATHS.findall(text)), f"{name_of(page)}: {found}"


def test_architecture_stays_short():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert len(prose(text).splitlines()) <= 150
