"""Tries releases newer than the default set's and prints what breaks.

    python tools/try_newer.py [DIR]                      the newest of each core package
    python tools/try_newer.py --to transformers==5.24.0  these instead
    python tools/try_newer.py --tests tests/models       fewer tests than make test-fast

Builds the default set in DIR (.venv-newer), upgrades the packages there, and runs the tests;
failures are grouped by their last line. Ends with pytest's exit code. The checkout's own
environment is left alone.
"""

import argparse
import os
import re
import subprocess
import sys
from collections import Counter
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORE = ("torch", "transformers", "peft", "datasets", "tokenizers", "accelerate", "bitsandbytes")
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)(?: - (.*))?$")


def installed(python: Path) -> dict[str, str]:
    """The release of each core package that the environment of ``python`` has."""
    listed = subprocess.run(
        [python, "-m", "pip", "freeze"], capture_output=True, text=True, check=True
    ).stdout
    pairs = (line.split("==") for line in listed.splitlines() if "==" in line)
    return {name: release for name, release in pairs if name in CORE}


def summary(output: str) -> list[str]:
    """Lines of pytest's short summary, alike ones counted: the most frequent first."""
    found = [match for line in output.splitlines() if (match := FAILED.match(line))]
    causes = Counter((match[2] or "no message")[:160] for match in found)
    files = Counter(match[1].split("::")[0] for match in found)
    lines = [f"{count:5} x {cause}" for cause, count in causes.most_common()]
    return lines + [f"{count:5} in {name}" for name, count in files.most_common()]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / ".venv-newer")
    parser.add_argument("--to", nargs="+", metavar="PACKAGE==RELEASE")
    parser.add_argument("--tests", nargs="+", default=["tests"])
    args = parser.parse_args()
    spec = spec_from_file_location("venv_tool", ROOT / "tools" / "venv.py")
    venv = module_from_spec(spec)
    spec.loader.exec_module(venv)
    folder = args.folder.absolute()
    # Without its stamp, so that `make` never takes an upgraded environment for its own.
    stamp = folder / ".coati-stamp"
    venv.build(folder, venv.DEFAULT, stamp, "")
    stamp.unlink()
    python = folder / "bin" / "python"
    before = installed(python)
    wanted = args.to or list(CORE)
    pip = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--upgrade", *wanted]
    if subprocess.run(pip).returncode:
        return 1
    after = installed(python)
    for name in sorted(after):
        if after[name] != before.get(name):
            print(f"{name} {before.get(name, 'none')} -> {after[name]}")
    tests = [python, "-m", "pytest", "-q", "-m", "not slow and not matrix", *args.tests]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"
    ran = subprocess.run(tests, cwd=ROOT, env=environment, capture_output=True, text=True)
    print("\n".join([*summary(ran.stdout), *ran.stdout.splitlines()[-1:]]))
    return ran.returncode


if __name__ == "__main__":
    sys.exit(main())
