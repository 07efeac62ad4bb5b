"""environment.json: what it holds, and that it can be asked for cheaply."""

import json
import os
import subprocess
import sys

import torch

import coati
from coati.utils import environment as module
from coati.utils.environment import environment, process, save_environment


def test_versions_command_and_machine(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--name", "two words"])
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("SECRET_TOKEN", "sesame")
    known = environment()
    assert known["coati"] == coati.__version__
    assert torch.__version__.startswith(known["packages"]["torch"].split("+")[0])
    assert known["command"] == "python train.py --name 'two words'"
    assert known["variables"]["NCCL_DEBUG"] == "INFO"
    assert known["cpus"] >= 1
    assert "sesame" not in json.dumps(known)
    assert process()["rank"] == 0


def test_the_commit_is_of_a_checkout_alone(tmp_path, monkeypatch):
    def commit():
        module._commit.cache_clear()
        return module._commit()

    folder = tmp_path / "source"
    (folder / "coati").mkdir(parents=True)
    (folder / "coati/__init__.py").write_text("")
    monkeypatch.setattr(coati, "__file__", str(folder / "coati/__init__.py"))
    assert commit() is None
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    first = commit()
    assert len(first) == 12 and not first.endswith("+")
    (folder / "coati/__init__.py").write_text("changed")
    assert commit() == f"{first}+"
    module._commit.cache_clear()


def test_what_a_run_wrote_early_is_kept_and_that_of_an_earlier_one_is_not(tmp_path, monkeypatch):
    path = tmp_path / "environment.json"
    save_environment(tmp_path, flags_given=["lr"])
    save_environment(tmp_path)
    held = json.loads(path.read_text())
    assert held["flags_given"] == ["lr"]
    assert [each["rank"] for each in held["processes"]] == [0]
    monkeypatch.setattr(os, "getpid", lambda: -1)  # a later process
    save_environment(tmp_path)
    assert "flags_given" not in json.loads(path.read_text())
