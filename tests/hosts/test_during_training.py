"""What happens to a run on two hosts when one of them freezes, dies, or the cable is cut."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.end_to_end.inputs import metrics, prepare, short_lines, weights, write_model
from tests.hosts.conftest import START_S, Process, TwoHosts, seconds_until_ended

pytestmark = pytest.mark.slow

TIMEOUT_S = 10.0
EPOCHS = ("--max_epochs", "16")
LATE_S = 20.0  # for ending a process on a loaded machine
SENTENCE = re.compile(r"^(?:\[rank \d\] )?coati sft: error: (.*)$", re.M)


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """A run of ``coati sft`` that would take minutes, with a checkpoint every 20 steps."""
    folder = tmp_path_factory.mktemp("run")
    model = write_model(folder / "model")
    rows = prepare(folder / "rows", short_lines(0, 48))
    given = ["--pretrain", model, "--dataset", rows, "--plugin", "zero2"]
    given += ["--mixed_precision", "fp32", "--max_length", "96", "--batch_size", "2"]
    given += ["--accumulation_steps", "1"]
    given += ["--lr", "1e-3", "--save_interval", "20", "--log_interval", "1", "--keep_last_k", "2"]
    return ["sft", *given, "--collective_timeout", str(TIMEOUT_S)]


def start_both(hosts: TwoHosts, words: list[str], save_dir: Path, *more: str) -> list[Process]:
    """One rank on each host, without a launcher; returns when steps are taken."""
    ranks = hosts.start_ranks([*words, "--save_dir", str(save_dir), "--max_epochs", "5000", *more])
    hosts.wait_for(save_dir / "metrics.jsonl", '"step": 45')
    return ranks


def sentences(process: Process) -> list[str]:
    assert "Traceback" not in process.text, process.text[-3000:]
    assert "gloo" not in process.text
    return SENTENCE.findall(process.text)


def check_ended(process: Process, seconds: float, limit: float, begins: str) -> None:
    print(f"{begins!r}: ended after {seconds:.1f} s")
    assert process.popen.returncode == 1, process.text[-3000:]
    assert seconds < limit
    (sentence,) = sentences(process)
    assert sentence.startswith(begins), sentence
    assert re.search(r"--checkpoint_path auto goes on from step \d+$", sentence), sentence


def last_event(save_dir: Path) -> str:
    return [
        line for line in (save_dir / "events.jsonl").read_text().splitlines() if '"failed"' in line
    ][-1]


def test_a_frozen_worker(hosts, words, tmp_path):
    ranks = start_both(hosts, words, tmp_path / "run")
    began = time.monotonic()
    os.kill(ranks[1].popen.pid, signal.SIGSTOP)
    seconds = seconds_until_ended(ranks[:1], began, TIMEOUT_S + LATE_S)
    check_ended(ranks[0], seconds[0], TIMEOUT_S + LATE_S, "rank 1 on node2 has not been heard of")
    assert "rank 1 on node2" in last_event(tmp_path / "run")


def test_a_cut_cable(hosts, words, tmp_path):
    ranks = start_both(hosts, words, tmp_path / "run")
    began = time.monotonic()
    hosts.tool("cut")
    limit = TIMEOUT_S + LATE_S
    for rank, seconds in enumerate(seconds_until_ended(ranks, began, limit)):
        other = f"rank {1 - rank} on node{2 - rank} has not been heard of"
        check_ended(ranks[rank], seconds, limit, other)
        assert "the network between node1 and node2 is cut" in ranks[rank].text.replace(
            "node2 and node1", "node1 and node2"
        )


def test_a_cable_that_is_mended_in_time(hosts, words, tmp_path):
    ranks = start_both(hosts, words, tmp_path / "run")
    hosts.tool("cut")
    time.sleep(TIMEOUT_S / 3)
    hosts.tool("mend")
    before = len(metrics(tmp_path / "run"))
    time.sleep(TIMEOUT_S)
    assert [one.popen.poll() for one in ranks] == [None, None]
    assert len(metrics(tmp_path / "run")) > before + 5


@pytest.mark.parametrize("node", [1, 2])
def test_a_killed_worker(hosts, words, tmp_path, node):
    ranks = start_both(hosts, words, tmp_path / "run")
    began = time.monotonic()
    os.kill(ranks[node - 1].popen.pid, signal.SIGKILL)
    other = ranks[2 - node]
    (seconds,) = seconds_until_ended([other], began, TIMEOUT_S + LATE_S)
    check_ended(other, seconds, TIMEOUT_S + LATE_S, f"rank {node - 1} on node{node} has ended")
    if node == 2:
        assert "rank 1 on node2 has ended" in last_event(tmp_path / "run")


def test_a_host_without_power(hosts, words, tmp_path):
    ranks = start_both(hosts, words, tmp_path / "run")
    began = time.monotonic()
    hosts.tool("blackout", "2")
    (seconds,) = seconds_until_ended(ranks[:1], began, TIMEOUT_S + LATE_S)
    check_ended(ranks[0], seconds, TIMEOUT_S + LATE_S, "rank 1 on node2 has not been heard of")


def elastic(hosts: TwoHosts, words: list[str], save_dir: Path, **variables: str) -> list[Process]:
    launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    launcher += ["--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-id", "run1"]
    launcher += ["--rdzv-endpoint", f"{hosts.address(1)}:29522"]
    more = ["--save_dir", str(save_dir), *EPOCHS]
    return [
        hosts.start(
            node,
            [*launcher, "--local-addr", hosts.address(node), "-m", "coati", *words, *more],
            **variables,
        )
        for node in (1, 2)
    ]


@pytest.fixture(scope="module")
def whole(both_hosts, words, tmp_path_factory) -> Path:
    """The same run, never interrupted."""
    save_dir = tmp_path_factory.mktemp("whole") / "run"
    ranks = both_hosts.ranks([*words, "--save_dir", str(save_dir), *EPOCHS])
    assert [one.code for one in ranks] == [0, 0], ranks[0].err[-3000:]
    return save_dir


@pytest.mark.parametrize("shared", ["0", "1"])
def test_an_elastic_restart_is_exact(hosts, words, whole, tmp_path, shared):
    """The worker of one host is killed, then that of the other."""
    disabled = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": shared}
    agents = elastic(hosts, words, tmp_path / "run", **disabled)
    for node, step in ((2, 30), (1, 70)):
        hosts.wait_for(tmp_path / "run" / "metrics.jsonl", f'"step": {step}')
        for pid in hosts.pids(node, "-m coati sft"):
            if b"torch.distributed.run" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
    assert [one.popen.wait(START_S) for one in agents] == [0, 0], agents[0].text[-3000:]
    assert agents[0].text.count("torchrun has started this run again: it goes on from") == 2
    assert weights(tmp_path / "run") == weights(whole)
    assert metrics(tmp_path / "run") == metrics(whole)
