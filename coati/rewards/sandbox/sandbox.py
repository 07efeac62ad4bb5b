"""Runs programs that nobody has read: under another user, in namespaces of their own (user,
network, mount, process, IPC), with limits of time, memory, processes, files and output, and with a
filter of system calls. By bubblewrap where there is one, else by
:mod:`coati.rewards.sandbox.namespaces`; by neither before it has been tried out that it holds."""

import json
import os
import pwd
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coati.rewards.sandbox import namespaces

HERE = Path(__file__).parent
MIB = 2**20
MACHINES = ("x86_64", "aarch64")  # whose system calls inside.py knows
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache")
LOOKS_S = 0.05
SLACK_S = 10.0  # for the sandbox itself, beside its cases
NOBODY = 65534


@dataclass(frozen=True)
class Limits:
    """Of one program. ``seconds``: for each case; ``memory``: bytes, of each process and of all
    together; ``files``: how many, ``file_bytes`` and ``disk_bytes``: how large one and all of them;
    ``output``: bytes written to standard output and error."""

    seconds: float = 10.0
    memory: int = 1024 * MIB
    processes: int = 16
    files: int = 1000
    file_bytes: int = 16 * MIB
    disk_bytes: int = 64 * MIB
    output: int = 4 * MIB
    open_files: int = 64

    def as_message(self) -> dict[str, Any]:
        """As inside.py takes them."""
        rlimits = {
            "AS": self.memory,
            "NPROC": self.processes + 1,  # and process 1
            "FSIZE": self.file_bytes,
            "NOFILE": self.open_files,
            "CORE": 0,
            "MEMLOCK": 0,
            "MSGQUEUE": 0,
        }
        return {"seconds": self.seconds, "output": self.output, "rlimits": rlimits}


@dataclass(frozen=True)
class Case:
    """What is asked of a program. ``stdin``: to be run on ``input``; ``call``: the result of
    ``function(*arguments)``; ``tests``: that the Python ``source`` runs through after it."""

    kind: str
    input: str = ""
    function: str = ""
    arguments: list[Any] = field(default_factory=list)
    source: str = ""
    entry_point: str | None = None


@dataclass(frozen=True)
class Ending:
    """How a case ended. ``how``: exit, signal, time, output, memory, files, or lost (the sandbox
    with it). ``code``: of the exit, or minus the signal. ``result``: JSON text of a call's result;
    ``passed``: whether tests ran through."""

    how: str
    code: int | None = None
    stdout: str = ""
    stderr: str = ""
    result: str | None = None
    passed: bool = False

    @property
    def reason(self) -> str:
        """In words, for whoever wants to know why there is no right result."""
        last = self.stderr.strip().rpartition("\n")[2][:200]
        if self.how == "exit":
            if last.startswith("MemoryError"):
                return WORDS["memory"]
            return last or f"exit status {self.code}"
        if self.how == "signal":
            with suppress(ValueError):
                return f"killed by {signal.Signals(-(self.code or 0)).name}"
        return WORDS.get(self.how, self.how)


WORDS = {
    "time": "the time limit",
    "output": "the limit of output",
    "memory": "the memory limit",
    "files": "the limit of files",
    "lost": "the sandbox ended with it",
}


class Refused(ValueError):
    """There is no isolation here that holds."""


class Sandbox:
    """Args:
        limits: of each program.
        engine: bubblewrap or namespaces; None: the first of the two that holds.

    Raises:
        Refused: saying for each engine why it does not hold.
    """

    def __init__(self, limits: Limits | None = None, engine: str | None = None) -> None:
        self.limits = limits or Limits()
        self.engine = engine or working_engine()
        if engine is not None and (problem := problem_of(engine)):
            raise Refused(f"{engine}: {problem}")

    def run(self, program: str, cases: Sequence[Case]) -> list[Ending]:
        """How each of ``cases`` ends, one after the other, each with the program run anew. Where
        one of them takes the whole sandbox along, the others end like it."""
        return _run(self.engine, self.limits, program, cases)


def _run(engine: str, limits: Limits, program: str, cases: Sequence[Case]) -> list[Ending]:
    reading, writing = os.pipe()
    try:
        command, settings = ENGINES[engine](limits, writing)
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(writing,),
            cwd="/",
            start_new_session=True,
            **settings,
        )
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(writing)
    token = os.urandom(16).hex()
    sender = threading.Thread(
        target=_send, args=(process.stdin, _messages(program, cases, limits, token)), daemon=True
    )
    sender.start()
    try:
        text, how, said = _watched(process, reading, limits, len(cases))
    finally:
        process.kill()
        process.wait()
        os.close(reading)
        process.stderr.close()
        sender.join()
    endings = [_ending(json.loads(line), token) for line in text.splitlines()[: len(cases)]]
    lost = Ending(how or "lost", stderr=said)
    return endings + [lost] * (len(cases) - len(endings))


def _messages(program: str, cases: Sequence[Case], limits: Limits, token: str) -> list[bytes]:
    """What inside.py reads. What is expected of a program stays outside."""
    asked = [
        {
            "kind": case.kind,
            "input": case.input,
            "function": case.function,
            "arguments": case.arguments,
        }
        for case in cases
    ]
    messages: list[Any] = [{"program": program, "limits": limits.as_message(), "cases": asked}]
    for case in cases:
        if case.kind == "tests":
            tests = {"source": case.source, "entry_point": case.entry_point, "token": token}
            messages.append(tests)
    texts = [json.dumps(message).encode() for message in messages]
    return [struct.pack(">Q", len(text)) + text for text in texts]


def _send(pipe: Any, messages: list[bytes]) -> None:
    with suppress(OSError), pipe:
        for message in messages:
            pipe.write(message)
        pipe.flush()


def _ending(line: dict[str, Any], token: str) -> Ending:
    back = line["back"]
    result = None
    if line["ended"] == "exit" and line["code"] == 0:
        with suppress(ValueError, KeyError, TypeError):
            result = json.dumps(json.loads(back)["result"])
    passed = back == token and line["ended"] == "exit" and line["code"] == 0
    return Ending(line["ended"], line["code"], line["stdout"], line["stderr"], result, passed)


def _watched(
    process: subprocess.Popen, reading: int, limits: Limits, count: int
) -> tuple[str, str | None, str]:
    """The lines that were reported, what ended the sandbox, and what it said."""
    ends = time.monotonic() + count * limits.seconds + SLACK_S
    parts: dict[int, list[bytes]] = {reading: [], process.stderr.fileno(): []}
    asking = selectors.DefaultSelector()
    for fd in parts:
        asking.register(fd, selectors.EVENT_READ)
    how = None
    while asking.get_map() and how is None:
        for key, _ in asking.select(LOOKS_S):
            part = os.read(key.fd, 2**16)
            if part:
                parts[key.fd].append(part)
            else:
                asking.unregister(key.fd)
        if time.monotonic() > ends:
            how = "time"
        else:
            how = _too_much(process.pid, limits)
    asking.close()
    said = b"".join(parts[process.stderr.fileno()])[-2000:]
    text = b"".join(parts[reading]).decode()
    return text[: text.rfind("\n") + 1], how, said.decode("utf-8", "replace")


def _too_much(pid: int, limits: Limits) -> str | None:
    """Which limit of all its processes together a sandbox exceeds. No limit of a process counts
    what all have in memory, nor how many files there are."""
    processes = _descendants(pid)
    memory = sum(_resident(one) for one in processes)
    if memory > limits.memory * 1.25:  # a page that processes share is counted for each
        return "memory"
    for one in processes[-1:]:
        with suppress(OSError):
            disk = os.statvfs(f"/proc/{one}/root/tmp")
            if 0 < disk.f_files - disk.f_ffree > limits.files + 50 and _small(disk, limits):
                return "files"
    return None


def _small(disk: os.statvfs_result, limits: Limits) -> bool:
    """Whether that is the sandbox's own /tmp, and not the host's before it was changed."""
    return disk.f_blocks * disk.f_frsize <= limits.disk_bytes + 2 * MIB


def _descendants(pid: int) -> list[int]:
    found = []
    waiting = [pid]
    while waiting:
        parent = waiting.pop()
        with suppress(OSError):
            for task in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{task}/children") as file:
                    children = [int(word) for word in file.read().split()]
                found += children
                waiting += children
    return found


def _resident(pid: int) -> int:
    with suppress(OSError, IndexError, ValueError), open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    return 0


# The two engines


def interpreter() -> str:
    """The Python that programs are run by: the one of this process."""
    return sys.executable


def prefixes() -> list[str]:
    """Where the interpreter and its packages lie."""
    return [sys.prefix, sys.base_prefix, sys.exec_prefix]


def _readable() -> tuple[list[str], list[tuple[str, str]]]:
    """The directories that a program may read, and links among them: the system's libraries and the
    interpreter with its packages."""
    links = [(path, os.readlink(path)) for path in SYSTEM if os.path.islink(path)]
    linked = {path for path, _ in links}
    wanted = [path for path in SYSTEM if os.path.exists(path) and path not in linked]
    for prefix in prefixes():
        wanted += [os.path.abspath(prefix), os.path.realpath(prefix)]
    found: list[str] = []
    for path in sorted(set(wanted), key=len):
        if not any(path == one or path.startswith(one + "/") for one in found):
            found.append(path)
    if "/" in found:
        raise OSError("the interpreter's prefix is /, so all files would be readable")
    return found, links


ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "TMPDIR": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


def _inside(report: int) -> list[str]:
    source = (HERE / "inside.py").read_text(encoding="utf-8")
    return [interpreter(), "-I", "-B", "-c", source, str(report)]


def outside_user() -> int:
    """Who a program is outside of its namespace: root becomes nobody, RLIMIT_NPROC does not bind
    root."""
    if os.geteuid() != 0:
        return os.geteuid()
    try:
        return pwd.getpwnam("nobody").pw_uid or NOBODY
    except KeyError:
        return NOBODY


def _bubblewrap(limits: Limits, report: int) -> tuple[list[str], dict[str, Any]]:
    readable, links = _readable()
    words = ["--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    words += ["--unshare-cgroup-try", "--die-with-parent", "--as-pid-1", "--clearenv"]
    words += ["--uid", str(namespaces.INSIDE), "--gid", str(namespaces.INSIDE), "--cap-drop", "ALL"]
    for name, value in ENVIRONMENT.items():
        words += ["--setenv", name, value]
    for path in readable:
        words += ["--ro-bind", path, path]
    for path, target in links:
        words += ["--symlink", target, path]
    for name in namespaces.DEVICES:
        words += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    words += ["--symlink", "/tmp", "/dev/shm"]
    words += ["--size", str(limits.disk_bytes), "--tmpfs", "/tmp", "--remount-ro", "/"]
    program = shutil.which("bwrap") or "bwrap"
    user = outside_user()
    ordinary = {"user": user, "group": user, "extra_groups": []} if os.geteuid() == 0 else {}
    return [program, *words, "--chdir", "/tmp", "--", *_inside(report)], ordinary


def _namespaces(limits: Limits, report: int) -> tuple[list[str], dict[str, Any]]:
    readable, links = _readable()
    spec = {
        "parent": os.getpid(),
        "user": outside_user(),
        "readable": readable,
        "links": links,
        "command": _inside(report),
        "environment": ENVIRONMENT,
        "bytes": limits.disk_bytes,
        "files": limits.files + 20,
    }
    program = str(HERE / "namespaces.py")
    return [sys.executable, "-I", "-S", "-B", program, json.dumps(spec)], {}


ENGINES = {"bubblewrap": _bubblewrap, "namespaces": _namespaces}

# Trying them out

_PROBE = """
import json, os, socket, sys
shown, port, parent, memory, processes = json.loads(sys.stdin.readline())
found = ["see /" + name for name in sorted(set(os.listdir("/")) - set(shown))]
def can(what, attempt):
    try:
        attempt()
    except (OSError, MemoryError):
        return
    found.append(what)
can("read /etc/passwd", lambda: open("/etc/passwd"))
can("write outside of /tmp", lambda: open(os.path.join(sys.prefix, "x"), "w"))
can("reach the network", lambda: socket.create_connection(("127.0.0.1", port), 1))
can("signal other processes", lambda: os.kill(parent, 0))
can("take more memory than allowed", lambda: bytearray(memory))
if os.getuid() == 0:
    found.append("be root")
children = []
try:
    for _ in range(processes):
        child = os.fork()
        if child == 0:
            sys.stdin.readline()
            os._exit(0)
        children.append(child)
    found.append("start any number of processes")
except OSError:
    pass
if not children:
    found.append("start no process of its own")
print(json.dumps(found))
for child in children:
    os.kill(child, 9)
"""
_tried: dict[str, str | None] = {}
_trying = threading.Lock()


def problem_of(engine: str) -> str | None:
    """Why ``engine`` does not hold here; None where it does. Tried out once in a process."""
    with _trying:
        if engine not in _tried:
            try:
                _tried[engine] = _try_out(engine)
            except (OSError, ValueError) as error:
                _tried[engine] = str(error)
        return _tried[engine]


def _try_out(engine: str) -> str | None:
    if sys.platform != "linux" or os.uname().machine not in MACHINES:
        where = f"{sys.platform} on {os.uname().machine}"
        return f"programs are isolated on Linux on {' and '.join(MACHINES)} alone; this is {where}"
    if engine == "bubblewrap" and shutil.which("bwrap") is None:
        return "bwrap is not installed"
    limits = Limits(seconds=10.0, memory=256 * MIB, processes=8)
    readable, links = _readable()
    shown = [path.split("/")[1] for path in [*readable, *(link for link, _ in links)]]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        asked = [
            [*shown, "dev", "tmp"],
            port,
            os.getpid(),
            limits.memory,
            limits.processes + 4,
        ]
        given = Case("stdin", input=json.dumps(asked) + "\n")
        ending = _run(engine, limits, _PROBE, [given])[0]
    if ending.how != "exit" or ending.code != 0:
        said = ending.stderr.strip().rpartition("\n")[2]
        return said or ending.reason
    found = json.loads(ending.stdout)
    return f"a program in it can {', '.join(found)}" if found else None


def working_engine() -> str:
    """The first engine that holds. Raises Refused with what is wrong with each, and the remedy."""
    problems = {}
    for engine in ENGINES:
        problem = problem_of(engine)
        if problem is None:
            return engine
        problems[engine] = problem
    why = "; ".join(f"{engine}: {problem}" for engine, problem in problems.items())
    raise Refused(
        f"programs cannot be isolated here, so none are run ({why}). Install bubblewrap (apt-get "
        "install bubblewrap) and allow user namespaces (in a container: --security-opt "
        "seccomp=unconfined, or --privileged)"
    )
