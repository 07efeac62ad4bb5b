"""What a run ran on: versions, devices, command line. Imports nothing heavy before it is asked."""

import hashlib
import os
import platform
import shlex
import socket
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from coati.utils.json_io import load_json, save_json
from coati.utils.redaction import redacted, redacted_words

_PACKAGE = sys.modules[__name__.partition(".")[0]]  # above this layer, and loaded before it
PACKAGES = (
    "torch",
    "transformers",
    "colossalai",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "flash-attn",
    "vllm",
    "ray",
    "bitsandbytes",
)
OF_ONE_PROCESS = ("vllm", "ray")  # used by one process of a run
# Environment variables that change how a run computes or communicates.
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE")
OF_THE_LAUNCHER = ("COATI_ERROR_FILE", "COATI_RUN_ID")
PREFIXES = ("NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "COATI_")
# Those that change results, or what is sent when, and so must be the same on all hosts; interfaces
# and adapters (NCCL_SOCKET_IFNAME, NCCL_IB_HCA, ...) are each host's own.
SAME_EVERYWHERE = (
    "CUBLAS_WORKSPACE_CONFIG",
    "GLOO_DEVICE_TRANSPORT",
    "NCCL_ALGO",
    "NCCL_NET",
    "NCCL_PROTO",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_DISTRIBUTED_DEBUG",
)
SOURCES = (".py", ".json", ".jinja", ".yaml", ".html", ".js")


def environment() -> dict[str, Any]:
    """Versions, devices, machine and command line of this process, as JSON has them.

    ``commit``: of the checkout that coati is imported from, with ``+`` where files differ from it;
    None for an installed package. ``memory_gib``: of the host.
    """
    return {
        "coati": _PACKAGE.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": installed(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpus": cpus(),
        "memory_gib": _memory_gib(),
        **_accelerators(),
        "command": command_line(),
        "directory": os.getcwd(),
        "variables": _variables(),
    }


def must_be_same() -> dict[str, str]:
    """What every process of a run must have in common whatever it trains: versions, this library's
    code, the kind of device and variables that change results."""
    import torch

    packages = {name: found for name, found in installed().items() if name not in OF_ONE_PROCESS}
    return {
        "coati": code_version(),
        "Python": ".".join(platform.python_version_tuple()[:2]),
        **packages,
        "the device": "cuda" if torch.cuda.is_available() else "cpu",
        **{name: os.environ[name] for name in SAME_EVERYWHERE if name in os.environ},
    }


def code_version() -> str:
    """``0.9.0, commit 0123456789ab, code ba9876543210``."""
    commit = _commit()
    return f"{_PACKAGE.__version__}{f', commit {commit}' if commit else ''}, code {code()}"


@cache
def code() -> str:
    """A hash of the library's own files, which says more than a version: of a checkout with
    changes, and where git cannot be asked."""
    folder = Path(str(_PACKAGE.__file__)).resolve().parent
    digest = hashlib.sha256()
    for file in sorted(one for one in folder.rglob("*") if one.suffix in SOURCES):
        digest.update(f"{file.relative_to(folder)}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def process() -> dict[str, Any]:
    """Where this process of a run stands: its rank, host and device."""
    import torch

    if torch.cuda.is_available():
        index = torch.cuda.current_device()
        device = f"{torch.cuda.get_device_name(index)} (cuda:{index})"
    else:
        device = f"CPU, {torch.get_num_threads()} threads"
    rank = int(os.environ.get("RANK", "0"))
    return {"rank": rank, "host": socket.gethostname(), "device": device}


def save_environment(folder: str | os.PathLike, **known: Any) -> None:
    """Write ``<folder>/environment.json``: :func:`environment`, where each process stands, and
    ``known``, which a later call without it keeps. Every rank must call it."""
    from coati.utils.distributed import all_gather_object, is_rank_0

    processes = all_gather_object(process())
    if not is_rank_0():
        return
    path = Path(folder) / "environment.json"
    started = environment() | {"processes": processes, "pid": os.getpid()}
    if not known and path.is_file():
        before = load_json(path)
        if all(before.get(name) == started[name] for name in ("host", "pid", "command")):
            return  # what this run has written already
    save_json(started | known, path)


def installed() -> dict[str, str]:
    """Name -> release of the packages that a run depends on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # an optional one
            continue
    return found


def _accelerators() -> dict[str, Any]:
    """``devices``: the GPUs that this process sees, ``cuda``: the version that torch was built
    for."""
    import torch

    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        known = torch.cuda.get_device_properties(index)
        devices.append(f"{known.name}, {known.total_memory / 2**30:.0f} GiB")
    return {"devices": devices, "cuda": torch.version.cuda}


def cpus() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _memory_gib() -> float | None:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not every system says
        return None
    return round(size / 2**30, 1)


def command_line() -> str:
    """What started this process, as a person writes it, without secrets."""
    program = Path(sys.argv[0])
    words = redacted_words(sys.argv[1:])
    if program.name in ("coati", "__main__.py"):
        return shlex.join(["coati", *words])
    return shlex.join([*(["python"] if program.suffix == ".py" else []), sys.argv[0], *words])


def _variables() -> dict[str, str]:
    found = {
        name: value
        for name, value in sorted(os.environ.items())
        if (name in VARIABLES or name.startswith(PREFIXES)) and name not in OF_THE_LAUNCHER
    }
    return redacted(found)


@cache
def _commit() -> str | None:
    folder = Path(str(_PACKAGE.__file__)).resolve().parents[1]
    if not (folder / ".git").exists():
        return None
    commit = _git(folder, "rev-parse", "--short=12", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+" if commit and changed else commit


def _git(folder: Path, *words: str) -> str | None:
    """What git prints; None without git, or where it refuses."""
    try:
        run = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None
