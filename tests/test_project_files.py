"""CITATION.cff, CHANGELOG.md, the forms and workflows of .github: they parse, and the commands and
promises in them hold."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from coati import __version__

ROOT = Path(__file__).parent.parent
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")
MAKE = re.compile(r"make (?P<target>[a-z-]+)(?: VENV=\S+)?(?P<pinned> PINNED=1)?")


def read(path: Path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps(path: Path) -> list[dict]:
    return [step for job in read(path)["jobs"].values() for step in job["steps"]]


def made(text: str) -> set[tuple[str, bool]]:
    """(target, on ColossalAI's own set) of every call of make."""
    return {(call["target"], bool(call["pinned"])) for call in MAKE.finditer(text)}


def targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_what_is_there(path):
    for step in steps(path):
        assert ("run" in step) != ("uses" in step), step
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"])
            continue
        words = step["run"].split()
        if words[0] == "make":
            assert words[1] in targets()
        elif words[0] == "bash":
            assert (ROOT / words[1]).is_file()
        else:
            assert words[0] == "git"


def test_continuous_integration_makes_what_ci_run_makes():
    local = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    local = re.sub(r"^#.*\n", "", local, flags=re.MULTILINE)
    runs = "\n".join(step.get("run", "") for step in steps(GITHUB / "workflows" / "ci.yml"))
    assert made(local) == {("lint", False), ("test", False), ("test-fast", True)}
    assert made(local) <= made(runs)
    assert "bash tools/install_browser.sh" in local and "bash tools/install_browser.sh" in runs


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_an_issue_form_asks(path):
    form = read(path)
    assert set(form) == {"name", "description", "labels", "body"}
    asked = [part for part in form["body"] if part["type"] != "markdown"]
    assert {part["type"] for part in asked} <= {"textarea", "input", "dropdown"}
    assert all(part["attributes"]["label"] for part in asked)
    assert len({part["id"] for part in asked}) == len(asked)
    for part in asked:
        choices = part["attributes"].get("options", ["text"])
        assert choices and all(isinstance(choice, str) for choice in choices)


def test_a_bug_comes_with_its_environment():
    assert [path.stem for path in FORMS] == ["bug", "feature", "question"]
    asked = {part.get("id"): part for part in read(GITHUB / "ISSUE_TEMPLATE" / "bug.yml")["body"]}
    assert "`coati env`" in asked["environment"]["attributes"]["description"]
    assert asked["environment"]["validations"]["required"] is True


def test_the_citation_is_of_this_release():
    cited = read(ROOT / "CITATION.cff")
    assert cited["cff-version"] == "1.2.0" and cited["type"] == "software"
    assert cited["message"] and cited["title"].startswith("coati")
    assert cited["authors"] == [{"name": "The coati authors"}]
    assert cited["version"] == __version__ and cited["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_the_changelog_ends_with_this_release_or_what_follows_it():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    released = [heading for heading in headings if heading != "Unreleased"]
    assert headings in (released, ["Unreleased", *released])
    versions, dates = zip(*(heading.split(" - ") for heading in released), strict=True)
    assert versions[0] == __version__
    assert list(dates) == sorted(dates, reverse=True)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for date in dates)


# Reads back what it wrote into a file without a name, which no other process can open.
OWN_PICKLES = {"joined_rows.py"}


def test_no_file_that_is_read_runs_code_of_its_own():
    """What SECURITY.md promises of weights and checkpoints."""
    found = 0
    for path in (ROOT / "coati").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            name = ast.unparse(node.func)
            where = f"{path.name}:{node.lineno}"
            if path.name not in OWN_PICKLES:
                assert name not in ("pickle.load", "pickle.loads", "yaml.load"), where
            if name == "torch.load":
                assert given.get("weights_only") == "True", where
            elif name == "np.load":
                assert given.get("allow_pickle", "False") == "False", where
            found += name in ("torch.load", "np.load")
    assert found
