"""Starts the processes of a run on this and other hosts, passes signals on, and ends them all with
the first that fails.

``python -m coati.recipes.launcher`` is what it runs on the other hosts: the job arrives on
standard input, then a line for each signal; the end of the input is a SIGTERM.
"""

import ctypes
import json
import os
import secrets
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
from typing import IO, Any, Protocol

from coati.cli.launch_flags import PORT, LaunchSettings, gpu_count
from coati.utils.environment import cpus
from coati.utils.errors import EARLY
from coati.utils.host_address import address_toward, addresses_of, is_loopback

GRACE_S = 10.0  # between SIGTERM and SIGKILL for the others, when one process has failed
POLL_S = 0.05
HERE = "localhost"
LOOPBACK = (HERE, "127.0.0.1", "::1")
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
OPTIONS = ("BatchMode=yes", "ConnectTimeout=20", "ServerAliveInterval=15", "ServerAliveCountMax=4")
SSH = ("-T", *(word for option in OPTIONS for word in ("-o", option)))
PR_SET_PDEATHSIG = 1  # prctl(2)
ERROR_FILE = "COATI_ERROR_FILE"  # where a process leaves the message that ends it
RUN_ID = "COATI_RUN_ID"  # the same in all processes of a run, and in no other run
AT_WORK = ".at-work"  # ending of the file that is there while a process has not reached its end
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
    run_id: str = "run"


class Worker(Protocol):
    """A process here, or all of another host."""

    name: str

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""

    def send(self, number: int) -> None:
        """Pass a signal on."""

    def message(self) -> str | None:
        """The error that it ended with; None where it left none."""

    def failure(self, code: int) -> str:
        """How it ended with ``code``, when it left no message."""


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
            RUN_ID: job.run_id,
        }
        # In a session of its own: Ctrl-C reaches it through the launcher alone, once.
        self._process = subprocess.Popen(
            [sys.executable, *job.command],
            env=environment,
            cwd=job.folder,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_end_with_launcher,
        )
        self._at_work = _mark(self._error, self._process.pid)

    def poll(self) -> int | None:
        code = self._process.poll()
        return EARLY if code == 0 and self._at_work.exists() else code

    def send(self, number: int) -> None:
        if self.poll() is not None:
            return
        if number == signal.SIGKILL:  # what it has started, too
            os.killpg(self._process.pid, number)
        else:
            self._process.send_signal(number)

    def message(self) -> str | None:
        return self._error.read_text(encoding="utf-8") if self._error.exists() else None

    def failure(self, code: int) -> str:
        if code < 0:
            why = f" ({KILLED})" if code == -signal.SIGKILL else ""
            return f"{self.name} was ended by {signal.Signals(-code).name}{why}"
        if code == EARLY and self._process.poll() == 0:
            return (
                f"{self.name} ended with exit code 0 before the end of its run: something called "
                "os._exit(0), in a reward function, a callback, or code that came with the model"
            )
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

    def message(self) -> str | None:
        return None  # its agent has printed it

    def failure(self, code: int) -> str:
        if code == 255:
            return (
                f"{self.name}: ssh could not connect, or lost the connection; `ssh {self.name} "
                "true` must work without a prompt"
            )
        return f"{self.name}: ended with exit code {code}; its own message is above"


@contextmanager
def rank_at_work() -> Iterator[None]:
    """In a process of a launcher: until the block is through, an exit code of 0 is no success."""
    if ERROR_FILE not in os.environ:
        yield
        return
    mark = _mark(Path(os.environ[ERROR_FILE]), os.getpid())
    mark.touch()
    yield
    mark.unlink(missing_ok=True)


def _mark(error_file: Path, process: int) -> Path:
    """With the process in its name: what a rank starts inherits the environment."""
    return error_file.with_name(f"{error_file.name}.{process}{AT_WORK}")


def launch(settings: LaunchSettings, command: Sequence[str]) -> int:
    """Run ``python COMMAND`` as every rank; the exit code: 0 if all ranks ended with 0.

    Raises ValueError for a host file that cannot be read, OSError where a process does not start.
    """
    return _run(plan(settings, list(command)))


def _run(jobs: Sequence[tuple[str, Job]], listen: bool = False) -> int:
    """``listen``: signals come on standard input, too."""
    with tempfile.TemporaryDirectory(prefix="coati-launch-") as errors, _signals() as received:
        workers: list[Worker] = []
        try:
            for name, job in jobs:
                workers += _start(name, job, Path(errors))
            if listen:
                threading.Thread(target=_listen, args=(received,), daemon=True).start()
            return supervise(workers, received)
        finally:
            _send(workers, signal.SIGKILL)


def plan(settings: LaunchSettings, command: list[str]) -> list[tuple[str, Job]]:
    """The job of each host, in the order of the host file."""
    hosts = settings.hosts
    counts = [host.slots or settings.nproc or 1 for host in hosts]
    several = len(hosts) > 1
    names = [host.name for host in hosts]
    first = settings.master_addr or (meeting_address(names) if several else "127.0.0.1")
    port = settings.master_port or (PORT if several else _free_port())
    environment = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
    if several and settings.master_addr is None and first in LOOPBACK:
        raise ValueError(
            f"--hostfile {settings.hostfile} begins with {first}, which is another machine on each "
            "host; write its name there, or give --master_addr"
        )
    run_id = secrets.token_hex(8)
    job = Job(command, os.getcwd(), 0, 0, sum(counts), first, port, environment, run_id)
    starts = [sum(counts[:index]) for index in range(len(counts))]
    return [
        (host.name, replace(job, processes=count, first_rank=start))
        for host, count, start in zip(hosts, counts, starts, strict=True)
    ]


def meeting_address(names: Sequence[str]) -> str:
    """Where the processes of the hosts ``names`` meet: by the first one's name; where that leads to
    loopback on the host itself (``127.0.1.1 name`` in Debian's /etc/hosts), by the address that it
    shows the second one."""
    first = names[0]
    found = addresses_of(first)
    if first in LOOPBACK or not found or not is_loopback(found[0]):
        return first
    address = address_toward(names[1])
    return first if address is None or is_loopback(address) else address


def _start(host: str, job: Job, errors: Path) -> list[Worker]:
    if not is_here(host):
        return [RemoteWorker(host, job)]
    _share_cores(job.processes)
    return [LocalWorker(job, local_rank, errors) for local_rank in range(job.processes)]


def _share_cores(processes: int) -> None:
    """Without a GPU each process computes on its share of the cores."""
    if "OMP_NUM_THREADS" not in os.environ and not gpu_count():
        os.environ["OMP_NUM_THREADS"] = str(max(1, cpus() // processes))


def is_here(host: str) -> bool:
    """Whether ``host`` is this machine: an address of it can be bound."""
    if host in LOOPBACK:
        return True
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except socket.gaierror:
        return False  # only ssh knows it, from its configuration
    return any(_can_bind(*address) for address in found)


def _can_bind(family: int, kind: int, protocol: int, _name: str, address: Any) -> bool:
    try:
        with socket.socket(family, kind, protocol) as trial:
            trial.bind(address)
    except OSError:  # another machine's, or of a family that this kernel lacks
        return False
    return True


def _free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT, SIGTERM and, as a SIGTERM, the SIGHUP of a closed terminal (not under
    nohup) instead of being ended by them."""
    received: list[int] = []

    def collect(number: int, _frame: FrameType | None) -> None:
        received.append(signal.SIGTERM if number == signal.SIGHUP else number)

    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        numbers.remove(signal.SIGHUP)
    before = {number: signal.signal(number, collect) for number in numbers}
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
    failed: tuple[Worker, int] | None = None
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
            if code and failed is None:
                failed = (worker, code)
                _send(waiting, signal.SIGTERM)
                deadline = time.monotonic() + GRACE_S
        if time.monotonic() > deadline:
            _send(waiting, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(POLL_S)
    if failed is None:
        return 0
    print("\n".join(_causes(workers, *failed)), file=sys.stderr, flush=True)
    return failed[1] if failed[1] > 0 else 128 - failed[1]


def _causes(workers: Sequence[Worker], first: Worker, code: int) -> list[str]:
    """The messages of all ranks, each once: the one that caused a failure need not be the first to
    end with it."""
    messages = list(dict.fromkeys(filter(None, (worker.message() for worker in workers))))
    silent = first.message() is None and (code < 0 or code == EARLY or not messages)
    return [first.failure(code), *messages] if silent else messages


def _send(workers: Sequence[Worker], number: int) -> None:
    for worker in workers:
        worker.send(number)


def main() -> int:
    """Run the job that arrives on standard input, under its signals."""
    text = sys.stdin.readline()
    if not text:
        return 1  # the first host is gone
    job = Job(**json.loads(text))
    os.environ.update(job.environment)
    return _run([(HERE, job)], listen=True)


def _end_with_launcher() -> None:
    """In a new process: SIGTERM when the launcher is gone, however it ended (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _listen(received: list[int]) -> None:
    for line in sys.stdin:
        received.append(int(signal.Signals[line.strip()]))
    received.append(int(signal.SIGTERM))


if __name__ == "__main__":
    sys.exit(main())
