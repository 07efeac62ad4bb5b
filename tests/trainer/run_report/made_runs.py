"""Run directories written by hand."""

import json
from pathlib import Path

STARTED = {"time": "2026-03-01T10:00:00Z", "event": "started", "step": 0, "method": "sft"}
STARTED |= {"total": 40, "unit": "step"}
METRICS = [
    {"step": 0, "eval/loss": 3.25, "eval/perplexity": 25.79},
    {"step": 10, "train/loss": 2.5, "train/lr": 2e-5, "train/tokens_per_second": 1234.5},
    {"step": 20, "train/loss": 1.75, "train/lr": 1e-5, "train/tokens_per_second": 1200.0},
    {"step": 20, "eval/loss": 1.5, "eval/perplexity": 4.48},
    {"step": 30, "train/loss": 1.25, "train/lr": 5e-6, "train/tokens_per_second": 1300.0},
    {"step": 40, "eval/loss": 1.625, "eval/perplexity": 5.08},
    {"step": 40, "memory/rank_0_peak_mb": 2048.0, "memory/rank_1_peak_mb": 1024.0},
]
ARGUMENTS = {"pretrain": "models/small-135m", "dataset": ["rows.jsonl"], "lr": 2e-5, "seed": 42}


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def made_run(folder, metrics=METRICS, events=(STARTED,), samples=(), arguments=ARGUMENTS, **known):
    """A run in ``folder``, which it returns. ``known``: its environment.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text(lines(metrics), encoding="utf-8")
    if events:
        (folder / "events.jsonl").write_text(lines(events), encoding="utf-8")
    if samples:
        (folder / "samples.jsonl").write_text(lines(samples), encoding="utf-8")
    if arguments:
        (folder / "arguments.json").write_text(json.dumps(arguments), encoding="utf-8")
    if known:
        (folder / "environment.json").write_text(json.dumps(known), encoding="utf-8")
    return folder


def event(kind, step, **known):
    return {"time": "2026-03-01T11:00:00Z", "event": kind, "step": step, **known}
