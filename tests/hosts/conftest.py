"""Two hosts on this machine: network namespaces with a cable between them."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.distributed.spawn import ROOT
from tests.hosts.inside import Forked

TOOL = Path(__file__).with_name("two_hosts.sh")
NEEDED = ("ip", "nsenter", "unshare", "sshd", "ssh", "ssh-keygen", "pgrep")
SBIN = "/usr/sbin:/sbin"
START_S = 600.0  # two starts at once take 60 to 200 s on a busy machine
NET = os.environ.get("NET", "10.77.0")
NAMES = f"127.0.0.1 localhost\n{NET}.1 node1\n{NET}.2 node2\n"
# As Debian's installer writes it: a host's own name leads to itself.
DEBIAN = {
    1: f"127.0.0.1 localhost\n127.0.1.1 node1\n{NET}.2 node2\n",
    2: f"127.0.0.1 localhost\n127.0.1.1 node2\n{NET}.1 node1\n",
}
SETTINGS = {
    "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
}
SSH_CONFIG = "StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n"


def why_not() -> str:
    """Why there can be no two hosts here; "" where there can."""
    if os.geteuid():
        return "network namespaces need root"
    path = os.pathsep.join((os.environ["PATH"], SBIN))
    missing = [program for program in NEEDED if shutil.which(program, path=path) is None]
    if missing:
        return f"{', '.join(missing)} missing (iproute2, util-linux, openssh, procps)"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True
    )
    return "this machine allows no namespaces" if tried.returncode else ""


@dataclass
class Process:
    """A command on a host; ``out`` and ``err`` are what it has said so far."""

    popen: subprocess.Popen | Forked
    files: tuple[Path, Path]
    began: float

    @property
    def out(self) -> str:
        return self.files[0].read_text(errors="replace")

    @property
    def err(self) -> str:
        return self.files[1].read_text(errors="replace")

    @property
    def text(self) -> str:
        return self.out + self.err


@dataclass(frozen=True)
class Ended:
    """How a process ended: exit code, what it printed, after how many seconds."""

    code: int
    out: str
    err: str
    seconds: float


class TwoHosts:
    """The hosts node1 (``address(1)``) and node2, which keep what is theirs in ``state``."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.processes: list[Process] = []

    def address(self, node: int) -> str:
        """Of a host, as the other reaches it."""
        return f"{NET}.{node}"

    def tool(self, *words: str) -> str:
        """Run two_hosts.sh; what it prints."""
        # Hosts inherit its output and keep it open, so a pipe would never end.
        with tempfile.TemporaryFile("w+") as said:
            done = subprocess.run(
                ["bash", str(TOOL), *words],
                env={**os.environ, "STATE": str(self.state)},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                timeout=120,
            )
            said.seek(0)
            text = said.read()
        assert done.returncode == 0, (words, text)
        return text

    def up(self) -> None:
        """Set both up; ssh takes their keys as they come."""
        self.tool("down")
        self.tool("up")
        (self.state / "dotssh" / "config").write_text(SSH_CONFIG)

    def tidy(self) -> None:
        """Both as they were at first: the cable in, the names right, nothing that a test left."""
        for process in self.processes:
            process.popen.kill()
            process.popen.wait()
        self.processes.clear()
        for node in (1, 2):
            if not Path(f"/proc/{self._first_process(node)}").exists():
                self.tool("boot", str(node))
            for pid in self.pids(node, sys.executable):
                os.kill(pid, signal.SIGKILL)
            for left in (self.state / f"node{node}" / "local").iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        self.tool("mend")
        self.names()

    def _first_process(self, node: int) -> str:
        return (self.state / f"node{node}" / "pid").read_text().strip()

    def names(self, texts: Mapping[int, str] | None = None) -> None:
        """Write /etc/hosts of both."""
        for node in (1, 2):
            (self.state / f"node{node}" / "hosts").write_text((texts or {}).get(node, NAMES))

    def start(self, node: int, words: Sequence[str], **variables: str) -> Process:
        """Start ``python WORDS`` on a host."""
        files = self._files(node)
        with files[0].open("w") as said, files[1].open("w") as complained:
            popen = subprocess.Popen(
                ["bash", str(TOOL), "on", str(node), sys.executable, *words],
                env={**os.environ, "STATE": str(self.state), **SETTINGS, **variables},
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=complained,
            )
        return self._began(popen, files)

    def fork(self, node: int, words: Sequence[str], **variables: str) -> Process:
        """Start ``coati WORDS`` on a host, in a process that need not import torch again; its
        ``popen.pid`` is as this system numbers it."""
        files = self._files(node)
        first = int(self._first_process(node))
        return self._began(Forked(first, words, SETTINGS | variables, files), files)

    def _files(self, node: int) -> tuple[Path, Path]:
        name = f"{len(self.processes)}-node{node}"
        return self.state / f"{name}.out", self.state / f"{name}.err"

    def _began(self, popen: subprocess.Popen | Forked, files: tuple[Path, Path]) -> Process:
        self.processes.append(Process(popen, files, time.monotonic()))
        return self.processes[-1]

    def wait(self, process: Process, seconds: float = START_S) -> Ended:
        """Until ``process`` has ended."""
        code = process.popen.wait(seconds)
        return Ended(code, process.out, process.err, time.monotonic() - process.began)

    def run(self, node: int, words: Sequence[str], **variables: str) -> Ended:
        return self.wait(self.start(node, words, **variables))

    def start_ranks(
        self, words: Sequence[str], own: Mapping[int, Sequence[str]] | None = None, **variables: str
    ) -> list[Process]:
        """``coati WORDS`` as two ranks without a launcher, one on each host; ``own``: further words
        of a host. ``variables``: of both, or of one host as ``NAME_AT_1``."""
        # Not forked for another library than the imported one; nor is the other, which would wait.
        fresh = any(name.startswith("PYTHONPATH") for name in variables)
        processes = []
        for node in (1, 2):
            settings = {
                "RANK": str(node - 1),
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "0",
                "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": "node1",
                "MASTER_PORT": "29555",
            }
            for name, value in variables.items():
                plain, _, at = name.partition("_AT_")
                if at in ("", str(node)):
                    settings[plain] = value
            more = (own or {}).get(node, ())
            if fresh:
                processes.append(self.start(node, ["-m", "coati", *words, *more], **settings))
            else:
                processes.append(self.fork(node, [*words, *more], **settings))
        return processes

    def ranks(
        self, words: Sequence[str], own: Mapping[int, Sequence[str]] | None = None, **variables: str
    ) -> list[Ended]:
        """As ``start_ranks``, until both have ended."""
        processes = self.start_ranks(words, own, **variables)
        seconds = seconds_until_ended(processes, processes[0].began, START_S)
        ended = [self.wait(one, 1) for one in processes]
        return [replace(one, seconds=after) for one, after in zip(ended, seconds, strict=True)]

    def pids(self, node: int, pattern: str) -> list[int]:
        """Processes of a host by their command lines, as this system numbers them."""
        return [int(word) for word in self.tool("pids", str(node), pattern).split()]

    def wait_for(self, path: Path, text: str, seconds: float = START_S) -> None:
        """Until ``text`` stands in ``path``."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if path.exists() and text in path.read_text(errors="replace"):
                return
            ended = [one for one in self.processes if one.popen.poll()]
            assert not ended, ended[0].text[-3000:]
            time.sleep(0.1)
        raise AssertionError(
            f"no {text!r} in {path}:\n" + "\n".join(p.text[-3000:] for p in self.processes)
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


@pytest.fixture(scope="module")
def both_hosts(tmp_path_factory) -> Iterator[TwoHosts]:
    """The hosts of a module's tests, gone with everything on them at the end."""
    if reason := why_not():
        pytest.skip(f"two hosts: {reason}")
    found = TwoHosts(tmp_path_factory.mktemp("two-hosts"))
    with (Path(tempfile.gettempdir()) / "two_hosts.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # there is one pair on a machine
        found.up()
        try:
            yield found
        finally:
            found.tool("down")


@pytest.fixture
def hosts(both_hosts) -> Iterator[TwoHosts]:
    """The two hosts, as a test finds them; what it breaks is mended after it."""
    yield both_hosts
    both_hosts.tidy()
