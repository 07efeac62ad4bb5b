"""The model card of an exported directory, from the run's own files alone."""

import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

from coati.utils.json_io import load_json

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

Written by coati's `coati export`. {checked}

## Base model

{base}

## Data

{data}

## Command

{command}

## Figures

{figures}

## Limits

- Responses can be wrong, biased or unsafe: nothing filters them. Try the model on your own \
questions.
- It was trained on the data named above alone; what the base model lacks, fine-tuning rarely adds.
- Prompts must be rendered with the chat template of this directory, and fit the context together \
with the response.
"""


def run_of(path: str | Path) -> Path | None:
    """The output directory of the run that wrote ``path``: the nearest folder above with an
    arguments.json."""
    folder = Path(path).absolute()
    near = (folder, *folder.parents[:4])
    return next((one for one in near if (one / "arguments.json").is_file()), None)


def run_files(path: str | Path) -> list[Path]:
    """What a card is made of: arguments.json and metrics.jsonl of the run that wrote ``path``, as
    far as there are."""
    run = run_of(path)
    files = [] if run is None else [run / name for name in ("arguments.json", "metrics.jsonl")]
    return [file for file in files if file.is_file()]


def model_card(path: str | Path, checked: str) -> str:
    """Markdown. ``path``: what was exported; ``checked``: a sentence on how the result was
    tested."""
    run = run_of(path)
    arguments = load_json(run / "arguments.json") if run else {}
    base = arguments.get("pretrain")
    return CARD.format(
        name=(run or Path(path).absolute()).name,
        checked=checked,
        base=f"`{Path(base).name if Path(base).is_absolute() else base}`"
        if base
        else "Not known: no arguments.json of a run was found beside the weights.",
        data="\n".join(_data(arguments)),
        command=_command(arguments),
        figures="\n".join(_figures(run)),
    )


def _data(arguments: dict[str, Any]) -> list[str]:
    named = arguments.get("dataset") or arguments.get("prompt_dataset") or []
    named = named if isinstance(named, list) else [named]
    if not named:
        return ["Not known."]
    return ["| data set | fingerprint (SHA-256 of its files) |", "| --- | --- |"] + [
        f"| `{_short(one)}` | {fingerprint(Path(one)) or 'its files are no longer there'} |"
        for one in named
    ]


def _short(place: str) -> str:
    return "/".join(Path(place).parts[-3:]) if Path(place).is_absolute() else str(place)


def fingerprint(place: Path) -> str | None:
    """16 digits that change with any byte of the data files of ``place``; None where there is
    nothing."""
    files = (
        [place]
        if place.is_file()
        else sorted(f for f in place.rglob("*") if f.suffix in (".arrow", ".jsonl"))
    )
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        name = file.relative_to(place) if file != place else file.name
        digest.update(f"{name} {file.stat().st_size}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _command(arguments: dict[str, Any]) -> str:
    given = {key: value for key, value in arguments.items() if value not in (None, False, [])}
    if not given:
        return "Not known."
    words = [word for key, value in given.items() for word in _words(key, value)]
    return f"The flags of the run, defaults among them:\n\n```\n{' '.join(words)}\n```"


def _words(key: str, value: Any) -> list[str]:
    values = [] if value is True else value if isinstance(value, list) else [value]
    texts = (_short(one) if isinstance(one, str) else json.dumps(one) for one in values)
    return [f"--{key}", *map(shlex.quote, texts)]


def _figures(run: Path | None) -> list[str]:
    """Each evaluation figure of metrics.jsonl, first and last, and the last training loss."""
    file = run / "metrics.jsonl" if run else None
    if file is None or not file.is_file():
        return ["None: no metrics.jsonl of a run was found beside the weights."]
    rows = [
        json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()
    ]
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith("eval/") or key in ("train/loss", "train/reward"):
                found.setdefault(key, []).append((row.get("step", 0), value))
    lines = ["| figure | at first | at last |", "| --- | --- | --- |"]
    for key, seen in sorted(found.items()):
        start, first = seen[0]
        end, last = seen[-1]
        lines.append(f"| {key} | {first:.4g} (step {start}) | {last:.4g} (step {end}) |")
    return lines if found else ["None were logged."]
