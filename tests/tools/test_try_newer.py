"""tools/try_newer.py with stand-ins for pip and pytest: nothing is installed."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
OUTPUT = """....F.F
FAILED tests/models/test_head.py::test_a - TypeError: no cache
FAILED tests/models/test_head.py::test_b - TypeError: no cache
ERROR tests/cli/test_x.py::test_c
2 failed, 5 passed in 1.0s"""


@pytest.fixture
def tool(monkeypatch):
    spec = importlib.util.spec_from_file_location("try_newer", ROOT / "tools" / "try_newer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_alike_failures_are_counted(tool):
    assert tool.summary(OUTPUT) == [
        "    2 x TypeError: no cache",
        "    1 x no message",
        "    2 in tests/models/test_head.py",
        "    1 in tests/cli/test_x.py",
    ]
    assert tool.summary("3 passed") == []


@pytest.mark.parametrize("installs, expected", [(0, 1), (1, 1)])
def test_it_upgrades_an_environment_of_its_own_and_tells_what_changed(
    tool, monkeypatch, tmp_path, capsys, installs, expected
):
    calls = []
    releases = iter(["torch==2.14.1\nother==1\n", "torch==2.15.0\nother==2\n"])

    def run(command, **options):
        words = [str(word) for word in command]
        calls.append(words)
        if "freeze" in words:
            return SimpleNamespace(stdout=next(releases), returncode=0)
        if "pytest" in words:
            return SimpleNamespace(stdout=OUTPUT, returncode=1)
        if words[1:3] == ["-m", "venv"]:
            Path(words[-1]).mkdir(parents=True)
        if words[1] == "-c":
            return SimpleNamespace(returncode=0)
        return SimpleNamespace(returncode=installs if "--upgrade" in words else 0)

    monkeypatch.setattr(tool.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["try_newer.py", str(tmp_path / "env"), "--to", "torch"])
    assert tool.main() == expected
    assert not (tmp_path / "env" / ".coati-stamp").exists()
    upgrade = next(words for words in calls if "--upgrade" in words)
    assert upgrade[0] == str(tmp_path / "env" / "bin" / "python") and upgrade[-1] == "torch"
    said = capsys.readouterr().out
    assert ("torch 2.14.1 -> 2.15.0" in said) == (not installs)
    assert ("2 x TypeError: no cache" in said) == (not installs)
