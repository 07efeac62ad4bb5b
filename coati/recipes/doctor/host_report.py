"""What one host has and lacks: versions, devices, room, address, port, limits, clock. In its short
form nothing heavy is imported."""

import os
import platform
import resource
import shutil
import socket
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from coati.rewards.sandbox.sandbox import Refused, working_engine
from coati.utils.environment import code_version, cpus, installed
from coati.utils.host_address import (
    address_toward,
    addresses_of,
    interface_of,
    is_loopback,
    own_address,
    port_in_use,
    port_is_free,
)
from coati.utils.packages import check_packages
from coati.utils.user_cache import cache_root

GIB = 2**30
MEND = "mend"  # a run would fail, or train something else
NOTE = "note"  # a run may fail or be slow
LEAST_SHM = 256 * 2**20  # a container's default of 64 MiB is too little for NCCL and for loaders
LEAST_FILES = 1024
LEAST_DISK = 10**9
LITTLE_DISK = 10 * 10**9
LITTLE_MEMORY = 2 * GIB
GPUS = Path("/proc/driver/nvidia/gpus")
QUERY = ("nvidia-smi", "--query-gpu=name,driver_version,memory.free", "--format=csv,noheader")


@dataclass(frozen=True)
class Finding:
    """One thing to MEND or to NOTE. ``host``: where; "" for all together."""

    level: str
    host: str
    found: str
    remedy: str

    @property
    def text(self) -> str:
        where = f"{self.host}: " if self.host else ""
        return f"{where}{self.found}; {self.remedy}"


@dataclass(frozen=True)
class Asked:
    """What a look at a host is about. ``port``: one that must be free there; ``toward``: another
    host of the run; ``short``: only what takes no time."""

    save_dir: str | None = None
    port: int | None = None
    processes: int = 1
    toward: str | None = None
    short: bool = False


def host_report(asked: Asked) -> dict[str, Any]:
    """Subject -> what was found, as JSON has it; ``findings``: as dictionaries."""
    host = socket.gethostname()
    findings: list[Finding] = []
    report: dict[str, Any] = {
        "host": host,
        "coati": code_version(),
        "Python": platform.python_version(),
        "packages": installed(),
        "system": platform.platform(),
        "cpus": cpus(),
    }

    def find(level: str, found: str, remedy: str) -> None:
        findings.append(Finding(level, host, found, remedy))

    _packages(find)
    report["devices"] = _devices(asked, find)
    report["free memory"] = _memory(find)
    report["free disk"] = _disks(asked, find)
    report["shared memory"] = _shared_memory(asked, find)
    report["open files"] = _open_files(find)
    report["address"] = _address(asked, find)
    report["port"] = _port(asked, find)
    report["ssh"] = shutil.which("ssh") or "none"
    if not asked.short:
        report["sandbox"] = _sandbox(find)
    report["findings"] = [asdict(one) for one in findings]
    return report


def _packages(find: Any) -> None:
    try:
        check_packages()
    except ValueError as error:
        what, _, remedy = str(error).partition("; run: ")
        find(MEND, what, f"run: {remedy}" if remedy else "install what belongs together")


def _devices(asked: Asked, find: Any) -> str:
    """The GPUs and their driver; "none"."""
    count = len(list(GPUS.iterdir())) if GPUS.is_dir() else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if count and visible is not None:
        count = len([one for one in visible.split(",") if one.strip() not in ("", "-1")])
    if count and asked.processes > count:
        find(
            MEND,
            f"{asked.processes} processes are to run on {count} GPUs",
            "lower --nproc (slots=N in --hostfile), or make more visible in CUDA_VISIBLE_DEVICES",
        )
    if asked.short or not count:
        return f"{count} GPUs" if count else "none"
    import torch

    if not torch.cuda.is_available():
        find(
            MEND,
            f"there are {count} GPUs, and torch {torch.__version__} cannot use them (it was built "
            f"for CUDA {torch.version.cuda})",
            "update the driver, or install the torch that fits it",
        )
    return _driver() or f"{count} GPUs"


def _driver() -> str | None:
    try:
        ran = subprocess.run(QUERY, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return "; ".join(ran.stdout.strip().splitlines()) if ran.returncode == 0 else None


def _memory(find: Any) -> str:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return "unknown"
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if ":" in line}
    free = sizes.get("MemAvailable", 0)
    if free < LITTLE_MEMORY:
        find(NOTE, f"only {_gib(free)} of memory are free", "end what else runs there")
    return f"{_gib(free)} of {_gib(sizes.get('MemTotal', 0))}"


def _disks(asked: Asked, find: Any) -> dict[str, str]:
    """Of the places that a run writes to. A --save_dir must be a directory, or one that can be
    made."""
    places = {"cache": cache_root(), "tmp": Path(tempfile.gettempdir())}
    if asked.save_dir is not None:
        places = {"save_dir": Path(asked.save_dir), **places}
    shown = {}
    for name, place in places.items():
        there = place.absolute()
        while not there.exists() and there != there.parent:
            there = there.parent
        flag = "--save_dir" if name == "save_dir" else name
        if not there.is_dir():
            find(MEND, f"{flag} {place}: {there} is no directory", "name another one")
            continue
        if not os.access(there, os.W_OK | os.X_OK):
            find(MEND, f"{flag} {place}: {there} cannot be written", _remedy_of(name))
        free = shutil.disk_usage(there).free
        if free < LITTLE_DISK and name == "save_dir" or free < LEAST_DISK:
            level = MEND if name == "save_dir" and free < LEAST_DISK / 10 else NOTE
            find(level, f"{flag} {place} has only {_gib(free)} free", _remedy_of(name))
        shown[name] = f"{_gib(free)} in {place}"
    return shown


def _remedy_of(name: str) -> str:
    return {
        "save_dir": "make room, or name another --save_dir",
        "cache": "coati cache --clear, or set XDG_CACHE_HOME",
        "tmp": "make room, or set TMPDIR",
    }[name]


def _shared_memory(asked: Asked, find: Any) -> str:
    place = Path("/dev/shm")
    if not place.is_dir():
        return "unknown"
    size = shutil.disk_usage(place)
    if size.total < LEAST_SHM and asked.processes > 1:
        find(
            NOTE,
            f"/dev/shm has {size.total / 2**20:.0f} MiB, through which the processes of a host "
            "send what they share",
            "start the container with --shm-size 16g or --ipc host",
        )
    return f"{_gib(size.free)} of {_gib(size.total)}"


def _open_files(find: Any) -> str:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < LEAST_FILES:
        find(NOTE, f"a process may open {soft} files", f"ulimit -n {max(soft, min(hard, 65536))}")
    return f"{soft} (at most {hard})"


def _address(asked: Asked, find: Any) -> str:
    """Under which others reach this host."""
    own = own_address()
    if own is not None and not is_loopback(own):
        return own
    leads = f"leads to {own}" if own else "has no address"
    if asked.toward is None or not addresses_of(asked.toward):  # only ssh knows the other
        return f"its name {leads}"
    mine = address_toward(asked.toward)
    interface = None if mine is None or is_loopback(mine) else interface_of(mine)
    if interface is None:
        find(
            MEND,
            f"its own name {leads}, and no interface toward {asked.toward} is known",
            "put its address into /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME",
        )
        return f"its name {leads}"
    return f"{mine} on {interface} (its name {leads}, so this is used)"


def _port(asked: Asked, find: Any) -> str:
    if asked.port is None:
        return "any free one"
    if port_is_free(asked.port):
        return f"{asked.port} is free"
    find(MEND, port_in_use(asked.port), "end it, or choose another --master_port")
    return f"{asked.port} is in use"


def _sandbox(find: Any) -> str:
    """What isolates the programs of the reward python_tests. Nothing else needs it."""
    try:
        return f"{working_engine()}: programs of --reward_functions python_tests can be run"
    except Refused as error:
        what, _, remedy = str(error).partition(". Install ")
        find(NOTE, f"--reward_functions python_tests: {what}", f"install {remedy}")
        return "none"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
