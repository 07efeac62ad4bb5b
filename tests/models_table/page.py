"""docs/models.md, written from the stored results."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from coati.parallel.families import NOT_CHAT
from tests.models_table.cells import COLUMNS, Column
from tests.models_table.families import FAMILIES, Family
from tests.models_table.run import FAILED, NO, YES

RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
PACKAGES = ("torch", "transformers", "peft", "colossalai")
NOT_TRIED = "not tried"

INTRODUCTION = """# Supported models

Written by `make models-table`, which tries every cell with a tiny random model on one, two or
(--tp 2 --pp 2) four processes; {date}, {versions}. Windows are shorter than the rows there, soft
caps bite, sinks are not zero and tokens go to several experts.

- "yes" under a plugin: two training steps, with padding and clipping, had the losses and gradient
  norms of a single process in the same precision (to 1e-5 in fp32, to 2e-2 in bf16, which Gemini
  needs). The columns
  split_gather, ring and all_to_all are the modes of sequence parallelism.
- "yes" under sampling: greedy responses to prompts of several lengths in one batch, some of which
  end early, are those of transformers' `generate` for each prompt alone.
- "yes" under saving: after a step under `--tp 2` the saved directory has the names and shapes that
  `save_pretrained` writes, and plain transformers loads it and computes the same logits.
- "yes" under packing: two rows in one sequence train as they do alone.
- "no": the library refuses the combination by name; the reasons are below. "not tried": the
  model's code is not part of transformers; ChatGLM runs on the pinned set (`PINNED=1`) under ddp,
  zero2, gemini and `--pp`.
"""
NOT_CHAT_TEXT = "Models that do not continue a text are refused by every plugin:"


def versions() -> dict[str, str]:
    """The installed releases that results depend on."""
    return {name: version(name) for name in PACKAGES}


def stored() -> dict[str, Any]:
    """``date``, ``versions`` and ``cells`` {"family | column": [kind, text]} of the last run."""
    empty = {"date": "", "versions": {}, "cells": {}}
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else empty


def store(results: dict[str, Any]) -> None:
    """Keep ``results``."""
    text = json.dumps(results, indent=0, ensure_ascii=False, sort_keys=True)
    RESULTS.write_text(text + "\n", encoding="utf-8")


def name_of(family: str, column: str) -> str:
    """The key of a cell in the stored results."""
    return f"{family} | {column}"


def page() -> str:
    """docs/models.md."""
    results = stored()
    found = ", ".join(f"{name} {release}" for name, release in results["versions"].items())
    header = ["model", "model_type", *(column.title for column in COLUMNS)]
    lines = [INTRODUCTION.format(date=results["date"], versions=found)]
    lines += [_line(header), _line(["---"] * len(header))]
    for family in FAMILIES:
        names = family.names + (" (`--trust_remote_code`)" if family.remote else "")
        cells = [_cell(results, family, column) for column in COLUMNS]
        lines.append(_line([names, f"`{family.type}`", *cells]))
    lines += ["", "## Why not", "", *_reasons(results)]
    others = ", ".join(f"{name} ({what})" for name, what in sorted(NOT_CHAT.items()))
    lines += ["", "## Not chat models", "", f"{NOT_CHAT_TEXT} {others}."]
    return "\n".join(lines) + "\n"


def _cell(results: dict[str, Any], family: Family, column: Column) -> str:
    kind = results["cells"].get(name_of(family.type, column.title), [NOT_TRIED])[0]
    return {YES: YES, NO: NO, FAILED: "fails"}.get(kind, NOT_TRIED)


def _reasons(results: dict[str, Any]) -> list[str]:
    told: dict[str, list[str]] = {}
    for key, (kind, text) in results["cells"].items():
        if kind in (NO, FAILED):
            told.setdefault(text, []).append(key)
    return sorted(
        f"- {text}" if len(keys) == 1 or kind_in(text, keys) else f"- {', '.join(keys)}: {text}"
        for text, keys in told.items()
    )


def kind_in(text: str, keys: list[str]) -> bool:
    """Whether ``text`` names the family itself."""
    return keys[0].split(" | ")[0] in text


def _line(entries: list[str]) -> str:
    return f"| {' | '.join(entries)} |"
