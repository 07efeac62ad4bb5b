"""The website that `make site` builds from docs/: it builds without a warning, every link on it
leads somewhere, and it loads nothing from elsewhere."""

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

import coati
from tools.griffe_roles import markdown_of
from tools.site_hooks import outside_links
from tools.venv import PINNED_DEV

ROOT = Path(__file__).parent.parent


class Page(HTMLParser):
    """Links, anchors and what a browser would load."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.loads: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors |= {values[name] for name in ("id", "name") if values.get(name)}
        if tag == "a" and values.get("href"):
            self.links.add(values["href"])
        elif tag == "link" and values.get("rel") not in ("canonical", "prev", "next"):
            self.loads.add(values["href"])
        elif values.get("src"):
            self.loads.add(values["src"])


def mkdocs(root: Path, goal: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(goal)],
        cwd=root,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", **environment},
        capture_output=True,
        text=True,
    )


def build(goal: Path, **environment: str) -> Path:
    run = mkdocs(ROOT, goal, **environment)
    assert run.returncode == 0, run.stdout + run.stderr
    return goal


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return build(tmp_path_factory.mktemp("site"), COATI_REPO_URL="")


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}


def test_every_page_is_there_as_html_and_as_markdown(site):
    for page in (ROOT / "docs").rglob("*.md"):
        built = site / page.relative_to(ROOT / "docs")
        assert built.with_suffix(".html").is_file(), page
        assert built.read_text(encoding="utf-8") == page.read_text(encoding="utf-8")


def test_links_and_anchors_lead_somewhere(site, pages):
    for path, page in pages.items():
        for link in page.links | page.loads:
            target, anchor = urldefrag(unquote(link))
            if re.match(r"\w+:", target):
                continue
            goal = (path.parent / target).resolve() if target else path
            assert goal.is_file(), f"{path.name} links to {link}"
            assert site in goal.parents
            if anchor and anchor != "__skip":
                assert anchor in pages[goal].anchors, f"{path.name} links to {link}"


def test_every_page_can_be_reached_from_the_start(site, pages):
    seen, waiting = set(), [site / "index.html"]
    while waiting:
        path = waiting.pop()
        if path in seen or path not in pages:
            continue
        seen.add(path)
        waiting += [
            (path.parent / unquote(urldefrag(link)[0])).resolve()
            for link in pages[path].links
            if not re.match(r"\w+:|#", link)
        ]
    assert seen == set(pages)


def test_nothing_is_loaded_from_elsewhere(site, pages):
    loads = {load for page in pages.values() for load in page.loads}
    assert not (found := {load for load in loads if re.match(r"(https?:)?//", load)}), found
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", text), sheet


def test_the_index_for_machines_leads_to_every_page(site):
    links = re.findall(r"\]\(([^)]+)\)", (site / "llms.txt").read_text(encoding="utf-8"))
    assert {site / link for link in links} == set(site.rglob("*.md"))


def test_the_python_pages_show_every_public_name(site, pages):
    shown = set().union(
        *(page.anchors for path, page in pages.items() if path.parent.name == "api")
    )
    for name, module in coati._EXPORTS.items():
        assert f"coati.{module}.{name}" in shown, name
        assert f"`{name}`" in (ROOT / "docs" / "api" / "coati.md").read_text(encoding="utf-8")
    for package in ("trainer", "parallel", "experience_maker", "rewards", "dataset", "models"):
        names = import_module(f"coati.{package}").__all__
        missing = {name for name in names if not any(x.endswith(f".{name}") for x in shown)}
        assert not missing, (package, missing)
    for path in (site / "api").glob("*.html"):
        assert not re.search(r":(class|func|data|meth):", path.read_text(encoding="utf-8")), path


def test_a_broken_link_ends_the_build(tmp_path):
    for name in ("coati", "docs", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    with (tmp_path / "docs" / "limits.md").open("a", encoding="utf-8") as page:
        page.write("[a](nowhere.md) [b](faq.md#nothing)\n")
    run = mkdocs(tmp_path, tmp_path / "site")
    assert run.returncode == 1
    assert "nowhere.md" in run.stderr and "#nothing" in run.stderr, run.stderr


def test_the_suite_builds_with_what_make_site_installs():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    lines = (ROOT / "docs" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    for line in lines:
        if not line.startswith("#"):
            assert f'"{line}"' in setup and line in PINNED_DEV


def test_links_out_of_docs():
    text = "See [rows](../examples/data/README.md#origin) and [`config/x.json`](../config/x.json)."
    assert outside_links(text, "data.md", "https://host/me/coati/") == (
        "See [rows](https://host/me/coati/blob/main/examples/data/README.md#origin) and "
        "[`config/x.json`](https://host/me/coati/blob/main/config/x.json)."
    )
    assert (
        outside_links(text, "data.md", "")
        == "See rows (`examples/data/README.md`) and `config/x.json`."
    )
    inside = "[flags](../flags.md#x) and ![a picture](../report.png)\n```\n[x](../../y)\n```\n"
    assert outside_links(inside, "flags/sft.md", "") == inside
    assert outside_links("[y](../../tests/y.py)", "flags/sft.md", "") == "y (`tests/y.py`)"


def test_the_repository_url_is_one_setting(tmp_path):
    site = build(tmp_path / "site", COATI_REPO_URL="https://host/me/coati")
    page = Page(site / "limits.html")
    assert "https://host/me/coati/blob/main/examples/data/README.md" in page.links


def test_docstrings_become_markdown():
    said = "See :func:`~coati.models.loss.centering` and :data:`X`::\n\n    x = {1: 2}\n"
    assert markdown_of(said) == "See `coati.models.loss.centering` and `X`:\n\n    x = {1: 2}\n"
