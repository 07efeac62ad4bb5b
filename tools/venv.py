"""Builds the virtual environment that `make` uses, or does nothing when it is already the right
one.

    python tools/venv.py DIR            torch 2.5.1, ColossalAI 0.5.0 and all else of
    requirements.txt
    python tools/venv.py DIR --latest   torch 2.11 to 2.13 and ColossalAI without its own pins

The environment is right when its stamp equals the hash of the requirements and of setup.py;
otherwise it is built anew. Uses the standard library only; any Python 3 can run it as long as some
Python 3.10 to 3.12 is installed.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CANDIDATES = (sys.executable, "python3.12", "python3.11", "python3.10", "python3")
IN_RANGE = "import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))"
DEFAULT = (
    # The last LLM Compressor for torch 2.5 declares numpy<2 and runs with 2.
    [["-r", "requirements.txt", "-e", ".[dev]"], ["--no-deps", "llmcompressor==0.6.0"]],
    ["requirements.txt", "setup.py"],
)
LATEST = (
    [
        ["-r", "requirements-latest.txt"],
        ["--no-deps", "colossalai==0.5.0"],
        ["--no-deps", "-e", "."],
    ],
    ["requirements-latest.txt", "setup.py"],
)


def find_python() -> str:
    """A Python 3.10 to 3.12 that can make virtual environments."""
    for name in CANDIDATES:
        path = shutil.which(name)
        # Asked, not believed: a version manager's shim may stand for a version that is not
        # installed.
        if path and subprocess.run([path, "-c", IN_RANGE], capture_output=True).returncode == 0:
            return path
    sys.exit(
        f"coati: no Python 3.10, 3.11 or 3.12 with the venv module among {', '.join(CANDIDATES)}; "
        "install one (Debian, Ubuntu: apt-get install python3-venv) or name it: make "
        "PYTHON=/path/to/python3.11"
    )


def digest(files: list[str]) -> str:
    return hashlib.sha256(b"\0".join((ROOT / name).read_bytes() for name in files)).hexdigest()


def build(folder: Path, steps: list[list[str]], stamp: Path, wanted: str) -> None:
    if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").exists():
        sys.exit(
            f"coati: {folder} holds other files and is no virtual environment; name another place "
            "with VENV="
        )
    print(f"coati: building {folder} (some GB; takes minutes)", flush=True)
    start = time.monotonic()
    commands = [[find_python(), "-m", "venv", "--clear", str(folder)]]
    # Compiling every module would be a third of the work, for the few that are ever imported.
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-compile"]
    commands += [[*pip, *step] for step in steps]
    for command in commands:
        if subprocess.run(command, cwd=ROOT).returncode:
            sys.exit(f"coati: failed: {' '.join(command)}")
    stamp.write_text(wanted)
    print(f"coati: built {folder} in {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latest", action="store_true")
    args = parser.parse_args()
    steps, files = LATEST if args.latest else DEFAULT
    folder = args.folder.absolute()
    stamp = folder / ".coati-stamp"
    wanted = digest(files)
    name = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    with open(Path(tempfile.gettempdir()) / f"coati-venv-{name}.lock", "w") as lock:
        fcntl.flock(
            lock, fcntl.LOCK_EX
        )  # two runs at once: the second waits and then has nothing to do
        if not (
            stamp.exists()
            and stamp.read_text() == wanted
            and os.access(folder / "bin" / "python", os.X_OK)
        ):
            build(folder, steps, stamp, wanted)


if __name__ == "__main__":
    main()
