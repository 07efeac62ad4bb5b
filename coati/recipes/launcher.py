"""Starts the processes of a run on this and other hosts, passes signals on, and ends them all with
the first that fails.

``python -m coati.recipes.launcher`` is what it runs on the other hosts: the job arrives on
standard input, then a line for each signal; the end of the input is a SIGTERM.
"""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import IO, Protocol

from coati.cli.launch_flags import PORT, LaunchSettings, gpu_count

GRACE_S = 10.0  # between SIGTERM and SIGKILL for the others, when one process has failed
POLL_S = 0.05
# Variables of the first host that decide what a run does; the others keep their own of all else.
PASSED_ON = (
    "COATI_",
    "CUDA_",
    "GLOO_",
    "HF_",
    "MKL_",
    "NCCL_",
    "OMP_",
    "PYTHON",
    "TOKENIZERS_",
    "TORCH",
    "TRANSFORMERS_",
    "WANDB_",
)
# No prompts, and a host that has gone silent is given up after a minute.
SSH = ("-T", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4")
ERROR_FILE = "COATI_ERROR_FILE"  # where a process leaves the message that ends it
KILLED = "often by the kernel, when memory ran out: see dmesg"


@dataclass(frozen=True)
class Job:
    """What one host runs. ``command``: words after the Python that runs it."""

    command: list[str]
    folder: str
    processes: int
    first_rank: int
    world_size: int
    master_addr: str
    master_port: int
    environment: dict[str, str]


class Worker(Protocol):
    """A process here, or all of another host."""

    name: str

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""

    def send(self, number: int) -> None:
        """Pass a signal on."""

    def failure(self, code: int) -> str:
        """Why it ended with ``code``."""


class LocalWorker:
    """One rank on this host."""

    def __init__(self, job: Job, local_rank: int, errors: Path) -> None:
        rank = job.first_rank + local_rank
        self.name = f"rank {rank}"
        self._error = errors / str(rank)
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(job.world_size),
            "LOCAL_WORLD_SIZE": str(job.processes),
            "MASTER_ADDR": job.master_addr,
            "MASTER_PORT": str(job.master_port),
            ERROR_FILE: str(self._error),
        }
        # In a session of its own: Ctrl-C reaches it through the launcher alone, once.
        self._process = subprocess.Popen(
            [sys.executable, *job.command],
            env=environment,
            cwd=job.folder,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def poll(self) -> int | None:
        return self._process.poll()

    def send(self, number: int) -> None:
        self._process.send_signal(number)  # nothing, if it has ended

    def failure(self, code: int) -> str:
        if self._error.exists():
            return self._error.read_text(encoding="utf-8")
        if code < 0:
            why = f" ({KILLED})" if code == -signal.SIGKILL else ""
            return f"{self.name} was ended by {signal.Signals(-code).name}{why}"
        return f"{self.name} ended with exit code {code}; its own message is above"


class RemoteWorker:
    """All ranks of another host, over ssh."""

    def __init__(self, host: str, job: Job) -> None:
        self.name = host
        variables = [f"PYTHONPATH={os.environ['PYTHONPATH']}"] if "PYTHONPATH" in os.environ else []
        start = shlex.join(["env", *variables, sys.executable, "-m", __spec__.name])
        self._process = subprocess.Popen(
            ["ssh", *SSH, host, f"cd {shlex.quote(job.folder)} && {start}"],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._write(json.dumps(asdict(job)))

    def poll(self) -> int | None:
        return self._process.poll()

    def send(self, number: int) -> None:
        self._write(signal.Signals(number).name)

    def _write(self, line: str) -> None:
        pipe: IO[str] = self._process.stdin
        try:
            pipe.write(line + "\n")
            pipe.flush()
        except BrokenPipeError:
            return  # it has ended; poll() says how

    def failure(self, code: int) -> str:
        if code == 255:
            return f"{self.name}: ssh failed; `ssh {self.name} true` must work without a prompt"
        return f"{self.name}: ended with exit code {code}; its own message is above"


def launch(settings: LaunchSettings, command: Sequence[str]) -> int:
    """Run ``python COMMAND`` as every rank; the exit code: 0 if all ranks ended with 0.

    Raises ValueError for a host file that cannot be read, OSError where a process does not start.
    """
    jobs = plan(settings, list(command))
    with tempfile.TemporaryDirectory(prefix="coati-launch-") as errors, _signals() as received:
        workers: list[Worker] = []
        try:
            for name, job in jobs:
                workers += _start(name, job, Path(errors))
            return supervise(workers, received)
        finally:
            for worker in workers:
                if worker.poll() is None:
                    worker.send(signal.SIGKILL)


def plan(settings: LaunchSettings, command: list[str]) -> list[tuple[str, Job]]:
    """The job of each host, in the order of the host file."""
    hosts = settings.hosts
    counts = [host.slots or settings.nproc or 1 for host in hosts]
    several = len(hosts) > 1
    first = settings.master_addr or (hosts[0].name if several else "127.0.0.1")
    port = settings.master_port or (PORT if several else _free_port())
    environment = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
    job = Job(command, os.getcwd(), 0, 0, sum(counts), first, port, environment)
    starts = [sum(counts[:index]) for index in range(len(counts))]
    return [
        (host.name, replace(job, processes=count, first_rank=start))
        for host, count, start in zip(hosts, counts, starts, strict=True)
    ]


def _start(host: str, job: Job, errors: Path) -> list[Worker]:
    if not is_here(host):
        return [RemoteWorker(host, job)]
    _share_cores(job.processes)
    return [LocalWorker(job, local_rank, errors) for local_rank in range(job.processes)]


def _share_cores(processes: int) -> None:
    """Without a GPU each process computes on its share of the cores."""
    if "OMP_NUM_THREADS" not in os.environ and not gpu_count():
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))


def is_here(host: str) -> bool:
    """Whether ``host`` is this machine: an address of it can be bound."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except socket.gaierror:
        return False  # only ssh knows it, from its configuration
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as trial:
            try:
                trial.bind(address)
                return True
            except OSError:
                continue
    return False


def _free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of being ended by them."""
    received: list[int] = []

    def collect(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, collect) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def supervise(workers: Sequence[Worker], received: list[int]) -> int:
    """Wait for all; the exit code of the first that failed, or 0.

    ``received``: signals to pass on, filled by handlers or another thread. The third Ctrl-C, and
    GRACE_S after a failure, end what still runs.
    """
    failed = 0
    told: set[str] = set()
    passed = 0
    deadline = float("inf")
    waiting = list(workers)
    while waiting:
        while passed < len(received):
            interrupts = received[: passed + 1].count(signal.SIGINT)
            _send(waiting, signal.SIGKILL if interrupts > 2 else received[passed])
            passed += 1
        for worker in [worker for worker in waiting if worker.poll() is not None]:
            waiting.remove(worker)
            code = worker.poll() or 0
            # Once the others are being ended, how they end says nothing.
            if code and not failed:
                _tell(worker.failure(code), told)
                failed = code if code > 0 else 128 - code
                _send(waiting, signal.SIGTERM)
                deadline = time.monotonic() + GRACE_S
        if time.monotonic() > deadline:
            _send(waiting, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(POLL_S)
    return failed


def _send(workers: Sequence[Worker], number: int) -> None:
    for worker in workers:
        worker.send(number)


def _tell(message: str, told: set[str]) -> None:
    if message not in told:
        told.add(message)
        print(message, file=sys.stderr, flush=True)


def main() -> int:
    """Run the job that arrives on standard input, under its signals."""
    text = sys.stdin.readline()
    if not text:
        return 1  # the first host is gone
    job = Job(**json.loads(text))
    os.environ.update(job.environment)
    with tempfile.TemporaryDirectory(prefix="coati-launch-") as errors, _signals() as received:
        threading.Thread(target=_listen, args=(received,), daemon=True).start()
        _share_cores(job.processes)
        workers = [LocalWorker(job, rank, Path(errors)) for rank in range(job.processes)]
        return supervise(workers, received)


def _listen(received: list[int]) -> None:
    for line in sys.stdin:
        received.append(int(signal.Signals[line.strip()]))
    received.append(int(signal.SIGTERM))


if __name__ == "__main__":
    sys.exit(main())
