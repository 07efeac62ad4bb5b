"""What a run's metrics.jsonl says: evaluation loss before and after, speed, peak memory of every process.

Exit code 1 when the evaluation loss has not fallen.
"""

import json
import sys
from pathlib import Path


def summary(entries: list[dict]) -> tuple[str, bool]:
    """The lines to print, and whether the evaluation loss fell. Raises ValueError with fewer than two evaluations."""
    losses = [entry["eval/loss"] for entry in entries if "eval/loss" in entry]
    if len(losses) < 2:
        raise ValueError(f"expected an evaluation before and one after training, found {len(losses)}")
    steps = max(entry["step"] for entry in entries)
    speeds = sorted(entry["train/tokens_per_second"] for entry in entries if "train/tokens_per_second" in entry)
    peaks = {name: value for entry in entries for name, value in entry.items() if name.startswith("memory/")}
    memory = [f"{mb * 2**20 / 1e9:.2f} GB ({_process(name)})" for name, mb in sorted(peaks.items())]
    lines = [
        f"Evaluation loss on rows not trained on: {losses[0]:.3f} before, {losses[-1]:.3f} after {steps} steps",
        f"Speed: {speeds[len(speeds) // 2]:.0f} tokens/s" if speeds else "",
        f"Peak memory: {', '.join(memory)}",
    ]
    return "\n".join(line for line in lines if line), losses[-1] < losses[0]


def _process(name: str) -> str:
    return "process " + name.removeprefix("memory/rank_").removesuffix("_peak_mb")


if __name__ == "__main__":
    with open(Path(sys.argv[1]), encoding="utf-8") as file:
        text, fell = summary([json.loads(line) for line in file])
    print(text)
    if not fell:
        sys.exit("result.py: the evaluation loss has not fallen")
