"""Gathers the wheels that coati needs on a machine with a CUDA build of torch and no package
registry: the default set of requirements.txt without what such a machine has (torch, numpy,
pyarrow, safetensors, ...).

    python tools/cuda_wheels.py OUT [--python-version 3.12] [--bitsandbytes]

There: python3 -m pip install --no-index --no-deps --target SITE OUT/*.whl, then
export PYTHONPATH=SITE. bitsandbytes, three times as large as all the others together, is only
needed for --quantize_base nf4, 8-bit optimizers and `--quant`.
"""

import argparse
import email
import re
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLOSSALAI = "colossalai==0.5.0"  # its own metadata asks for another torch
OF_REQUIREMENTS = ("transformers", "peft", "datasets", "galore_torch")
# A wheel, and what is taken in the range that its metadata names
NEEDED = {"transformers": ("tokenizers",), "datasets": ("dill", "multiprocess")}
PLATFORMS = ("2_34", "2_31", "2_28", "2_27", "2_24", "2_17")


def wanted(name: str) -> str:
    """The line of requirements.txt about ``name``."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if re.split(r"[<>=!~]", line)[0].strip() == name)


def range_in(wheel: Path, name: str) -> str:
    """What the metadata of ``wheel`` requires of ``name``, as pip takes it."""
    with zipfile.ZipFile(wheel) as archive:
        path = next(one for one in archive.namelist() if one.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(path))
    for line in metadata.get_all("Requires-Dist") or []:
        required, _, marker = line.partition(";")
        if re.match(r"[\w.-]+", required)[0] == name and "extra" not in marker:
            return required.strip()
    raise SystemExit(f"cuda_wheels.py: {wheel.name} requires no {name}; mend NEEDED")


def pip(*words: str) -> None:
    if subprocess.run([sys.executable, "-m", "pip", *words]).returncode:
        sys.exit(f"cuda_wheels.py: failed: pip {' '.join(words)}")


def gather(out: Path, python_version: str, bitsandbytes: bool) -> None:
    platforms = [f"--platform=manylinux_{each}_x86_64" for each in PLATFORMS]
    download = ["download", "-q", "--no-deps", "--only-binary=:all:", "--implementation=cp"]
    download += [f"--python-version={python_version}", *platforms]
    download += ["--platform=manylinux2014_x86_64", "-d", str(out)]
    names = [*OF_REQUIREMENTS, *["bitsandbytes"] * bitsandbytes]
    pip(*download, *map(wanted, names))
    for name, needed in NEEDED.items():
        wheel = next(out.glob(f"{name}-*.whl"))
        pip(*download, *(range_in(wheel, other) for other in needed))
    pip("wheel", "-q", "--no-deps", COLOSSALAI, "-w", str(out))  # it has no wheel of its own


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--python-version", default="3.12", help="of that machine")
    parser.add_argument("--bitsandbytes", action="store_true", help="40 MiB more")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if old := [path.name for path in args.out.glob("*.whl")]:
        parser.error(f"{args.out} holds wheels already ({old[0]}, ...): name an empty folder")
    gather(args.out, args.python_version, args.bitsandbytes)
    wheels = sorted(args.out.glob("*.whl"))
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 2**20:6.1f} MiB  {wheel.name}")
    print(f"{sum(wheel.stat().st_size for wheel in wheels) / 2**20:6.1f} MiB")


if __name__ == "__main__":
    main()
