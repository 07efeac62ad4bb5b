"""Measure speed and memory of this machine with the programs of benchmarks/."""

import os
import subprocess
import sys
from pathlib import Path

from coati.cli.bench_programs import ALL, CHECKOUT, USUAL, programs, table
from coati.cli.this_machine import BenchSettings, bench_parser, parse_bench
from coati.cli.verb import Verb

VERB = Verb(
    "machine", bench_parser, parse_bench, "coati.recipes.verbs.bench:main", subject="--names"
)


def main(settings: BenchSettings) -> None:
    """Run them one after the other; the first that fails ends it. Raises ValueError outside a
    source checkout and for a name that is not there."""
    known = programs()
    if not known:
        raise ValueError(
            "benchmarks/ belongs to the source checkout, and this coati is an installed package "
            f"({CHECKOUT / 'coati'}); run it in a checkout. `coati measure MODEL` "
            "measures one model anywhere"
        )
    if settings.list:
        print(table())
        return
    names = [one for name in settings.names for one in (USUAL if name == ALL else (name,))]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no benchmark {unknown[0]!r}; there are {ALL}, {', '.join(known)}")
    output = Path(settings.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(names):
        _run(known[name], output / f"{name}.json")


def _run(program: Path, output: Path) -> None:
    words = [sys.executable, str(program)]
    if '"--output"' in program.read_text(encoding="utf-8"):
        words += ["--output", str(output)]
    paths = [str(CHECKOUT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    done = subprocess.run(words, env=environment)
    if done.returncode:
        raise ValueError(f"{program.name} ended with exit code {done.returncode}; see above")
