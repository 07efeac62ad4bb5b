"""Measure speed and memory of this machine with the programs of benchmarks/."""

import ast
import os
import subprocess
import sys
from pathlib import Path

from coati.cli.this_machine import BenchSettings, bench_parser, parse_bench
from coati.cli.verb import Verb

VERB = Verb(
    "machine", bench_parser, parse_bench, "coati.recipes.verbs.bench:main", subject="--names"
)
USUAL = ("sft", "head_memory", "dpo", "rollout", "prepack", "data", "ppo")
PACKAGE = Path(__file__).resolve().parents[2]
CHECKOUT = PACKAGE.parent


def main(settings: BenchSettings) -> None:
    """Run them one after the other; the first that fails ends it. Raises ValueError outside a
    source checkout and for a name that is not there."""
    programs = {
        path.stem.removeprefix("bench_"): path
        for path in sorted((CHECKOUT / "benchmarks").glob("bench_*.py"))
    }
    if not programs:
        raise ValueError(
            "benchmarks/ belongs to the source checkout, and this coati is an installed package "
            f"({PACKAGE}); run it in a checkout. `coati measure MODEL` "
            "measures one model anywhere"
        )
    if settings.list:
        for name, path in programs.items():
            print(f"{name:<18}{_about(path)}")
        return
    if unknown := [name for name in settings.names if name not in programs]:
        raise ValueError(f"no benchmark {unknown[0]!r}; there are {', '.join(programs)}")
    output = Path(settings.output)
    output.mkdir(parents=True, exist_ok=True)
    for name in settings.names or USUAL:
        _run(programs[name], output / f"{name}.json")


def _run(program: Path, output: Path) -> None:
    words = [sys.executable, str(program)]
    if '"--output"' in program.read_text(encoding="utf-8"):
        words += ["--output", str(output)]
    paths = [str(CHECKOUT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    done = subprocess.run(words, env=environment)
    if done.returncode:
        raise ValueError(f"{program.name} ended with exit code {done.returncode}; see above")


def _about(program: Path) -> str:
    text = ast.get_docstring(ast.parse(program.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())
