"""Two hosts on this machine: network namespaces with a cable between them."""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.distributed.spawn import ROOT

TOOL = Path(__file__).parent / "two_hosts.sh"
NEEDED = ("ip", "nsenter", "unshare", "/usr/sbin/sshd", "ssh-keygen")


def why_not() -> str:
    """Why there can be no two hosts here; "" where there can."""
    if os.geteuid():
        return "network namespaces need root"
    missing = [program for program in NEEDED if shutil.which(program) is None]
    if missing:
        return f"{missing[0]} is missing (iproute2, util-linux, openssh-server)"
    tried = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"])
    return "this machine allows no namespaces" if tried.returncode else ""


@dataclass
class Process:
    """A command on a host, and what it has said so far in ``output``."""

    popen: subprocess.Popen
    output: Path

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")


@dataclass
class TwoHosts:
    """The hosts node1 (``address(1)``) and node2."""

    folder: Path
    processes: list[Process] = field(default_factory=list)

    def address(self, node: int) -> str:
        """Of a host, as the other reaches it."""
        return f"{os.environ.get('NET', '10.77.0')}.{node}"

    def tool(self, *words: str) -> str:
        """Run two_hosts.sh."""
        done = subprocess.run([str(TOOL), *words], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, node: int, words: list[str], **variables: str) -> Process:
        """Start ``words`` (after python) on a host."""
        output = self.folder / f"node{node}-{len(self.processes)}.txt"
        settings = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        settings |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"} | variables
        given = [f"{name}={value}" for name, value in settings.items()]
        with output.open("w") as file:
            popen = subprocess.Popen(
                [str(TOOL), "on", str(node), "env", *given, sys.executable, *words],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
            )
        self.processes.append(Process(popen, output))
        return self.processes[-1]

    def pids(self, node: int, pattern: str) -> list[int]:
        """Processes of a host by their command lines, as this system numbers them."""
        return [int(word) for word in self.tool("pids", str(node), pattern).split()]

    def wait_for(self, path: Path, text: str, seconds: float = 240) -> None:
        """Until ``text`` stands in ``path``."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if path.exists() and text in path.read_text(errors="replace"):
                return
            ended = [one for one in self.processes if one.popen.poll()]
            assert not ended, ended[0].text[-3000:]
            time.sleep(0.1)
        raise AssertionError(
            f"no {text!r} in {path}:\n" + "\n".join(p.text for p in self.processes)
        )


def seconds_until_ended(processes: list[Process], since: float, limit: float) -> list[float]:
    """Of each process, from ``since`` (monotonic) on; infinity where it did not end."""
    found = [float("inf")] * len(processes)
    while float("inf") in found and time.monotonic() - since < limit:
        for index, process in enumerate(processes):
            if found[index] == float("inf") and process.popen.poll() is not None:
                found[index] = time.monotonic() - since
        time.sleep(0.05)
    return found


@pytest.fixture
def two_hosts(tmp_path) -> Iterator[TwoHosts]:
    """Fresh hosts, gone with everything on them at the end."""
    if reason := why_not():
        pytest.skip(reason)
    hosts = TwoHosts(tmp_path)
    with open(
        Path(os.environ.get("STATE", tempfile.gettempdir())).parent / "two_hosts.lock", "w"
    ) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # there is one pair on a machine
        hosts.tool("down")
        hosts.tool("up")
        try:
            yield hosts
        finally:
            subprocess.run([str(TOOL), "down"], timeout=60)
            for process in hosts.processes:
                process.popen.kill()
                process.popen.wait()
