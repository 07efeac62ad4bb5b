"""How many processes a run has, and on which hosts. Imports neither torch nor ColossalAI."""

import argparse
import os
import shutil
import subprocess
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from coati.cli.parser import Parser
from coati.cli.values import add_count, add_number, add_switch, add_text, whole_number
from coati.utils.constants import COLLECTIVE_TIMEOUT_S
from coati.utils.logging import get_logger

logger = get_logger(__name__)

AUTO = "auto"
PORT = 29500


@dataclass(frozen=True)
class Host:
    """A line of ``--hostfile``. ``slots``: its processes; None: ``--nproc``."""

    name: str
    slots: int | None = None


@dataclass(frozen=True)
class LaunchSettings:
    """The processes that ``coati`` starts itself. ``nproc`` None and no ``hostfile``: this one
    process, or those of another launcher."""

    nproc: int | None = None
    hostfile: str | None = None
    master_addr: str | None = None
    master_port: int | None = None
    collective_timeout: float = COLLECTIVE_TIMEOUT_S
    no_preflight: bool = False

    @property
    def hosts(self) -> list[Host]:
        """Those of ``hostfile``, or this one alone. Raises ValueError naming its line."""
        return read_hosts(self.hostfile) if self.hostfile else [Host("localhost")]

    @property
    def wanted(self) -> bool:
        """Whether processes are to be started: asked for, and not done yet."""
        asked = self.hostfile is not None or (self.nproc or 1) > 1
        return asked and "RANK" not in os.environ


def add_launch_flags(parser: Parser) -> None:
    """The flags that start several processes."""
    group = parser.add_argument_group(
        "launch",
        "Processes of this run. Without these flags there is one, or those of colossalai run or "
        "torchrun.",
    )
    group.add_argument(
        "--nproc",
        type=_processes,
        metavar="N|auto",
        help="processes to start on each host; auto: one per GPU, or one without a GPU",
    )
    add_text(
        group,
        "--hostfile",
        unit="FILE",
        help="hosts to start them on by ssh, one name per line, optionally with slots=N; the first "
        "is the master",
    )
    add_text(
        group,
        "--master_addr",
        unit="ADDRESS",
        help="address of the first host as the others reach it; default: its name in --hostfile",
    )
    add_count(
        group,
        "--master_port",
        unit="PORT",
        help=f"port of the first host at which all meet; default: {PORT} with --hostfile, else a "
        "free one",
    )
    add_switch(
        group,
        "--no_preflight",
        help="start without the short look at the hosts that comes first (coati doctor)",
    )
    add_number(
        group,
        "--collective_timeout",
        default=COLLECTIVE_TIMEOUT_S,
        unit="SECONDS",
        exclusive=True,
        help="end a run of several processes when one of them has not been heard of for so long, "
        "or when all wait for each other; one that works alone is waited for",
    )


def _processes(text: str) -> int | str:
    if text == AUTO:
        return AUTO
    try:
        return whole_number(1)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}; or {AUTO}") from error


_processes.schema = {  # type: ignore[attr-defined]
    "anyOf": [{"type": "integer", "minimum": 1}, {"const": AUTO}]
}


def check_launch(args: Namespace) -> None:
    """Settle ``--nproc auto``. Raises ValueError for what contradicts itself."""
    if args.nproc == AUTO:
        if args.hostfile is not None:
            raise ValueError(
                "--nproc auto counts the GPUs of this host, not those of --hostfile; give a "
                "number, or slots=N after each name"
            )
        args.nproc = gpu_count() or 1
    _note_other_launcher(args)
    for flag in ("master_addr", "master_port"):
        if getattr(args, flag) is not None and args.nproc is None and args.hostfile is None:
            raise ValueError(f"--{flag} does nothing without --nproc or --hostfile")
    if args.hostfile is not None:
        read_hosts(args.hostfile)
        if args.nproc is None and any(host.slots is None for host in read_hosts(args.hostfile)):
            raise ValueError(
                f"--hostfile {args.hostfile} does not say how many processes each host has; give "
                "--nproc, or slots=N after each name"
            )


def _note_other_launcher(args: Namespace) -> None:
    found = int(os.environ.get("WORLD_SIZE", "1"))
    ours = "COATI_ERROR_FILE" in os.environ
    if "RANK" in os.environ and not ours and (args.nproc or found) != found:
        logger.warning_once(
            f"--nproc {args.nproc} starts nothing: another launcher has set RANK, and WORLD_SIZE "
            f"is {found}"
        )


def processes_of(args: Namespace) -> int:
    """Processes of the whole run: those of the launcher that started this one, or those to
    start."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    hosts = read_hosts(args.hostfile) if args.hostfile else [Host("localhost")]
    return sum(host.slots or args.nproc or 1 for host in hosts)


def read_hosts(path: str) -> list[Host]:
    """The hosts of a file: ``name`` or ``name slots=N`` on each line, ``#`` begins a comment.

    Raises ValueError naming file and line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(
            f"--hostfile {path}: {error.strerror}; expected a file with one host name per line"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--hostfile {path}: byte {error.start} is not UTF-8") from error
    hosts: list[Host] = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        where = f"--hostfile {path}:{number}"
        name, *rest = words
        slots = [word.removeprefix("slots=") for word in rest if word.startswith("slots=")]
        if len(rest) > 1 or len(slots) != len(rest) or not all(map(_positive, slots)):
            raise ValueError(f"{where}: expected 'name' or 'name slots=N', found {line.strip()!r}")
        if name.startswith("-"):
            raise ValueError(f"{where}: {name!r} is no host name")
        if name in (host.name for host in hosts):
            raise ValueError(f"{where}: {name} stands there twice")
        hosts.append(Host(name, int(slots[0]) if slots else None))
    if not hosts:
        raise ValueError(f"--hostfile {path} names no host; expected one name per line")
    return hosts


def _positive(text: str) -> bool:
    return text.isdecimal() and int(text) > 0


def gpu_count() -> int:
    """GPUs that a process here would see, without loading torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    found = subprocess.run([program, "--list-gpus"], capture_output=True, text=True)
    return sum(line.startswith("GPU ") for line in found.stdout.splitlines())
