"""The Dockerfiles, as far as they can be checked without a builder: what they copy and install, and
that what .dockerignore lets through makes the whole wheel."""

import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from zipfile import ZipFile

import pytest

from coati.utils.packages import INSTALL_COLOSSALAI
from tests.package.environments import ROOT, outer
from tests.package.test_contents import CACHES

FILES = sorted((ROOT / "docker").glob("Dockerfile.*"))


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, its words) of each line of a Dockerfile, continued ones joined."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = [line.partition(" ") for line in text.replace("\\\n", " ").splitlines()]
    return [(line[0], line[2].strip()) for line in lines if line[0]]


def is_sent(path: str) -> bool:
    """Whether the builder gets a file of the checkout: the last rule that matches it, or a folder
    around it, decides."""
    found = True
    parts = path.split("/")
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        rule = line.removeprefix("!")
        if not rule or rule.startswith("#"):
            continue
        if rule.startswith("**/"):
            matches = rule.removeprefix("**/") in parts
        else:
            matches = fnmatch("/".join(parts[: rule.count("/") + 1]), rule)
        found = line.startswith("!") if matches else found
    return found


def test_what_is_sent_makes_the_whole_wheel(built, tmp_path):
    """Nothing that the wheel holds is left out, nothing else is sent."""
    assert not is_sent(".git/config") and not is_sent("coati/utils/__pycache__/lazy.pyc")
    assert not is_sent("tests/tiny.py") and not is_sent("examples/data/sft.jsonl")
    assert is_sent("examples/recipes/any.yaml")
    source = tmp_path / "source"
    for folder in ("coati", "config", "examples", "."):
        for path in (ROOT / folder).glob("*" if folder == "." else "**/*"):
            name = path.relative_to(ROOT).as_posix()
            if path.is_file() and not set(CACHES) & set(path.parts) and is_sent(name):
                (source / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, source / name)
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*wheel, "-w", tmp_path, source], check=True, env=outer(), cwd=tmp_path)
    with ZipFile(built[0]) as ours, ZipFile(next(tmp_path.glob("*.whl"))) as theirs:
        assert set(theirs.namelist()) == set(ours.namelist())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_names_what_is_there(path):
    lines = instructions(path)
    runs = " ".join(words for name, words in lines if name == "RUN")
    for name, words in lines:
        if name == "COPY" and "--from" not in words:
            assert (ROOT / words.split()[0]).exists(), words
    for requirements in re.findall(r"-r (\S+)", runs):
        assert (ROOT / requirements).is_file()
    assert INSTALL_COLOSSALAI in runs and runs.count("colossalai") == 1
    (extras,) = [words.partition("=")[2] for name, words in lines if words.startswith("EXTRAS=")]
    assert set(extras.split(",")) <= {"serve", "quantize", "cleaning", "ray"}
    for pattern in re.findall(r"grep '(.+?)' requirements.txt", runs):
        needed = (ROOT / "requirements.txt").read_text(encoding="utf-8")
        assert len(re.findall(pattern, needed, re.MULTILINE)) == 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_image_runs_coati_without_privileges(path):
    """The last stage: a user by number, who can write where the folder is mounted."""
    lines = instructions(path)
    starts = [index for index, (name, _) in enumerate(lines) if name == "FROM"]
    last = lines[starts[-1] :]
    told = dict(last)
    assert len(starts) == 2, "what builds the environment stays out of the image"
    assert int(told["USER"]) > 0 and f"--uid {told['USER']} " in told["RUN"]
    assert told["WORKDIR"] == "/work" and "install -d -m 1777 /work" in told["RUN"]
    assert told["ENTRYPOINT"] == '["coati"]'
