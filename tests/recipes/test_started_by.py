"""How a run is started again: the launcher's own words, on several hosts too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from coati.recipes import finish, started_by
from coati.recipes.started_by import launcher_words, started_again, warn_of_secrets

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "examples/training_scripts/train_sft.py"
RUN = ["/env/bin/python3.11", "/env/bin/torchrun"]
SHELL = ["bash", "-c", 'cd /x && export HF_TOKEN="hf_0123456789" && torchrun ...']
NODES = ["--nnodes", "2", "--nproc_per_node", "8"]
RDZV = ["--rdzv-backend", "c10d", "--rdzv-id", "run1", "--rdzv-endpoint", "node1:29500"]
VARIABLES = {
    "RANK": "0",
    "GROUP_WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "8",
    "TORCHELASTIC_RUN_ID": "run1",
    "MASTER_ADDR": "node1",
}


def test_torchrun_on_two_hosts():
    above = [[*RUN, *NODES, *RDZV, SCRIPT, "--lr", "1"], ["bash"]]
    assert started_again(above, SCRIPT, None, VARIABLES) == (
        ["torchrun", *NODES, *RDZV, SCRIPT],
        "on every host",
    )


@pytest.mark.parametrize("program", [["-m", "coati"], ["/env/bin/coati"]])
def test_the_command_under_torchrun(program):
    above = [["python", "-m", "torch.distributed.run", *NODES, *program, "sft", "--lr", "1"]]
    found = started_again(above, "/env/bin/coati", "coati", VARIABLES)
    assert found == (["torchrun", *NODES, *program], "on every host")


def test_colossalai_run_is_the_one_that_was_typed():
    typed = ["/env/bin/python", "/env/bin/colossalai", "run", "--hostfile", "h", SCRIPT, "--lr"]
    above = [[*RUN, "--node_rank=0", SCRIPT, "--lr"], SHELL, typed, ["bash"]]
    words, where = started_again(above, SCRIPT, None, VARIABLES)
    assert words == ["colossalai", "run", "--hostfile", "h", SCRIPT] and where == ""
    # Rank 0 is not where it was typed.
    words, where = started_again(above[:2], SCRIPT, None, VARIABLES)
    assert words == ["torchrun", "--node_rank=0", SCRIPT]
    assert where == "on every host, with its own --node_rank"


def test_where_the_processes_above_cannot_be_read():
    words, where = started_again([], SCRIPT, None, VARIABLES)
    assert words == ["torchrun", "--nnodes", "2", *RDZV, "--nproc_per_node", "8", SCRIPT]
    assert where == "on every host"
    alone = VARIABLES | {"GROUP_WORLD_SIZE": "1"}
    assert started_again([], SCRIPT, None, alone) == (
        ["torchrun", "--nproc_per_node", "8", SCRIPT],
        "",
    )


def test_ranks_that_were_started_by_hand():
    found = started_again([["bash"]], SCRIPT, None, {"RANK": "1"})
    assert found == (["python", SCRIPT], "for every rank, as before")


def test_other_programs_named_alike_are_not_taken():
    assert launcher_words([["vim", "torchrun.txt"], ["torchrun", "other.py"]], [SCRIPT]) is None


@pytest.mark.parametrize(
    ("launched", "said"),
    [
        (True, "coati sft --hostfile h --nproc 8 --lr 1e-5 --checkpoint_path auto"),
        (False, "(on every host) torchrun --nnodes 2 -m coati sft --hostfile h --nproc 8 --lr"),
    ],
)
def test_the_whole_command(monkeypatch, launched, said):
    words = ["sft", "--hostfile", "h", "--nproc", "8", "--lr", "1e-5", "--checkpoint_path", "x"]
    monkeypatch.setattr("sys.argv", ["/env/coati/__main__.py", *words])
    monkeypatch.setattr(
        finish, "ancestors", lambda: [["torchrun", "--nnodes", "2", "-m", "coati", *words]]
    )
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("COATI_ERROR_FILE", raising=False)
    if launched:
        monkeypatch.setenv("COATI_ERROR_FILE", "/tmp/x")
    assert finish.command_again().startswith(said)
    assert finish.command_again().endswith("--checkpoint_path auto")


def test_the_processes_above_this_one_are_read():
    code = "from coati.recipes.started_by import ancestors; print(ancestors()[0])"
    ran = subprocess.run(
        ["bash", "-c", '"$0" -c "$1"; true', sys.executable, code, "mark"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert ran.stdout.startswith("('bash', '-c', ") and "'mark')" in ran.stdout, ran.stderr


def test_a_secret_on_a_command_line_is_said_without_it(monkeypatch, capsys):
    monkeypatch.setattr(started_by, "ancestors", lambda: (tuple(SHELL),))
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    monkeypatch.setenv("WANDB_API_KEY", "not-on-that-line")
    monkeypatch.delenv("RANK", raising=False)
    warn_of_secrets()
    said = capsys.readouterr().err
    assert "HF_TOKEN can be read by every user" in said and "coati --hostfile" in said
    assert "hf_0123456789" not in said and "WANDB" not in said
    monkeypatch.setattr(started_by, "ancestors", lambda: (("bash",),))
    warn_of_secrets()
    assert not capsys.readouterr().err
