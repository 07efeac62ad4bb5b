"""The programs of ``coati bench``: what lies in benchmarks/ of the source checkout, by name."""

import ast
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
ALL = "all"
USUAL = ("sft", "head_memory", "dpo", "rollout", "prepack", "data", "ppo")  # what all stands for


def programs() -> dict[str, Path]:
    """Their files by name; empty outside a source checkout."""
    return {
        path.stem.removeprefix("bench_"): path
        for path in sorted((CHECKOUT / "benchmarks").glob("bench_*.py"))
    }


def table() -> str:
    """A line for each: its name, and what it measures."""
    return "\n".join(f"{name:<18}{_about(path)}" for name, path in programs().items())


def _about(program: Path) -> str:
    text = ast.get_docstring(ast.parse(program.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())
