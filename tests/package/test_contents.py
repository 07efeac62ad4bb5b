"""What the wheel and the sdist hold, and what their metadata say."""

import re
import tarfile
from email import message_from_bytes
from pathlib import Path
from zipfile import ZipFile

import pytest

from coati import __version__
from tests.package.environments import ROOT

CACHES = ("__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".ipynb_checkpoints")


def files(folder: str) -> set[str]:
    """The files of a folder of the checkout, without caches."""
    paths = (ROOT / folder).rglob("*")
    return {
        path.relative_to(ROOT).as_posix()
        for path in paths
        if path.is_file() and not set(CACHES) & set(path.parts)
    }


@pytest.fixture(scope="module")
def wheel(built):
    with ZipFile(built[0]) as archive:
        yield archive


@pytest.fixture(scope="module")
def metadata(wheel):
    return message_from_bytes(wheel.read(f"coati-{__version__}.dist-info/METADATA"))


def test_the_wheel_holds_the_library_its_templates_and_recipes_and_nothing_else(wheel):
    shipped = {*files("config"), *files("examples/recipes")}
    library = files("coati")
    assert any(name.endswith(".html") for name in library)
    assert any(name.endswith(".jinja") for name in library)
    about = {name for name in wheel.namelist() if name.startswith(f"coati-{__version__}.dist-info")}
    assert set(wheel.namelist()) - about == library | {f"coati/{name}" for name in shipped}


def test_the_sdist_is_the_checkout(built):
    with tarfile.open(built[1]) as archive:
        held = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    folders = "coati config examples benchmarks docs tests tools docker .github .ci".split()
    for folder in folders:
        assert files(folder) and files(folder) <= held, sorted(files(folder) - held)
    tops = {name for name in held if "/" not in name}
    assert tops >= {"setup.py", "pyproject.toml", "requirements.txt", "LICENSE", "CHANGELOG.md"}
    assert not [name for name in held if set(CACHES) & set(Path(name).parts) or ".pyc" in name]
    made = {"PKG-INFO", "setup.cfg"}
    others = {name.split("/")[0] for name in held - made if "/" in name} - {*folders}
    assert others == {"coati.egg-info"}


def test_the_wheel_says_what_it_is(wheel, metadata):
    assert metadata["Name"] == "coati" and metadata["Version"] == __version__
    assert set(metadata["Requires-Python"].split(",")) == {">=3.11", "<3.15"}
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Summary"] and metadata["Author"] == "The coati authors"
    about = f"coati-{__version__}.dist-info"
    assert wheel.read(f"{about}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert wheel.read(f"{about}/entry_points.txt").decode().split("\n")[:2] == [
        "[console_scripts]",
        "coati = coati.__main__:main",
    ]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload(decode=True).decode().strip() == readme.strip()


def test_the_wheel_does_not_ask_for_colossalai(metadata):
    """Its metadata would bring torch 2.5.1; a run without it names the command instead."""
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert {re.match(r"[\w-]+", line)[0] for line in needed} >= {"torch", "transformers", "peft"}
    assert not [line for line in metadata.get_all("Requires-Dist") if "colossalai" in line.lower()]
    extras = ["cleaning", "dev", "eval", "liger", "quantize", "ray", "serve"]
    assert metadata.get_all("Provides-Extra") == extras
