"""Two hosts of network namespaces, and one process of a run on each."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("two_hosts.sh")
NEEDED = ("ip", "nsenter", "unshare", "sshd", "ssh", "ssh-keygen", "pgrep")
LIMIT_S = 600
NAMES = "127.0.0.1 localhost\n10.77.0.1 node1\n10.77.0.2 node2\n"
# As Debian's installer writes it: a host's own name leads to itself.
DEBIAN = {
    1: "127.0.0.1 localhost\n127.0.1.1 node1\n10.77.0.2 node2\n",
    2: "127.0.0.1 localhost\n127.0.1.1 node2\n10.77.0.1 node1\n",
}


def lacking() -> str | None:
    """Why this machine cannot make two hosts; None where it can."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    path = f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin"
    missing = [name for name in NEEDED if shutil.which(name, path=path) is None]
    return f"needs {', '.join(missing)} (iproute2, util-linux, openssh)" if missing else None


@dataclass(frozen=True)
class Ended:
    """How a process ended: exit code, what it printed, after how many seconds."""

    code: int
    out: str
    err: str
    seconds: float


class TwoHosts:
    """``state``: where the hosts keep what is theirs."""

    def __init__(self, state: Path) -> None:
        self.state = state

    def do(self, *words: str) -> None:
        ran = subprocess.run(
            ["bash", str(SCRIPT), *words],
            env={**os.environ, "STATE": str(self.state)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=60,
        )
        assert ran.returncode == 0, words

    def up(self) -> None:
        """Set both up; ssh takes their keys as they come."""
        self.do("up")
        config = self.state / "dotssh" / "config"
        config.write_text(
            "StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n"
        )

    def names(self, texts: Mapping[int, str] | None = None) -> None:
        """Write /etc/hosts of both."""
        for host in (1, 2):
            (self.state / f"node{host}" / "hosts").write_text((texts or {}).get(host, NAMES))

    def start(self, host: int, words: Sequence[str], **env: str) -> subprocess.Popen:
        """``python WORDS`` there."""
        paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
        variables = {
            "PATH": os.pathsep.join(paths),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
        }
        return subprocess.Popen(
            ["bash", str(SCRIPT), "on", str(host), sys.executable, *words],
            env={**os.environ, "STATE": str(self.state), **variables, **env},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, host: int, words: Sequence[str], **env: str) -> Ended:
        started = time.monotonic()
        process = self.start(host, words, **env)
        out, err = process.communicate(timeout=LIMIT_S)
        return Ended(process.returncode, out, err, time.monotonic() - started)

    def ranks(
        self, words: Sequence[str], own: Mapping[int, Sequence[str]] | None = None, **env: str
    ) -> list[Ended]:
        """``coati WORDS`` as two ranks without a launcher, one on each host; ``own``: further words
        of a host. ``env``: variables of both, or of one host as ``NAME_AT_1``."""
        started = time.monotonic()
        processes = []
        for host in (1, 2):
            variables = {
                "RANK": str(host - 1),
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "0",
                "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": "node1",
                "MASTER_PORT": "29555",
            }
            for name, value in env.items():
                plain, _, at = name.partition("_AT_")
                if at in ("", str(host)):
                    variables[plain] = value
            more = (own or {}).get(host, ())
            processes.append(self.start(host, ["-m", "coati", *words, *more], **variables))
        ended = []
        for process in processes:
            out, err = process.communicate(timeout=LIMIT_S)
            ended.append(Ended(process.returncode, out, err, time.monotonic() - started))
        return ended
