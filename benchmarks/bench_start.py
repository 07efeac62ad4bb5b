"""How long it takes from the command to the first optimizer step: SFT of SmolLM2-135M on prepared
rows, without an evaluation before training.

Each start is a process of its own, `coati sft` with its phases noted; the first one, which fills
the disk cache, is not counted. Moments are seconds since the process was asked for, medians over
the repeats; the step is one row. ``--way imports`` prints the modules that take longest instead.

    python benchmarks/bench_start.py [--repeats 3] [--model DIR] [--output results.json]
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "bench_start"
TEMPLATE = ROOT / "config" / "conversation_template" / "HuggingFaceTB_SmolLM2-135M-Instruct.json"
BEGAN = "COATI_BENCH_BEGAN"  # on the system's monotonic clock, when the process was asked for
NOTES = "COATI_BENCH_NOTES"  # the file for what the process notes
WAYS = ("plain", "imports")
SHOWN = 40


def prepare(model: str | None, folder: Path = CACHE) -> tuple[Path, Path]:
    """The model's directory, and the rows of examples/data/sft.jsonl prepared for it."""
    sys.path.insert(0, str(ROOT / "examples" / "demo"))
    import smollm2

    directory = Path(model) if model else smollm2.prepare()
    rows = folder / "arrow"
    if not rows.exists():
        from coati.dataset import prepare_dataset, setup_conversation_template
        from coati.models import load_tokenizer

        tokenizer = load_tokenizer(str(directory))
        prepare_dataset(
            inputs=[ROOT / "examples" / "data" / "sft.jsonl"],
            tokenizer=tokenizer,
            tokenizer_name=str(directory),
            template=setup_conversation_template(tokenizer, str(TEMPLATE)),
            arrow_dir=rows,
            max_length=512,
            num_bins=1,
            show=None,
        )
    return directory, rows


def arguments(model: Path, rows: Path) -> list[str]:
    """Flags of a run of one step."""
    words = {"pretrain": model, "dataset": rows, "max_steps": 1, "batch_size": 1}
    words |= {"accumulation_steps": 1, "max_length": 512}
    return [str(word) for name, value in words.items() for word in (f"--{name}", value)]


def noted() -> None:
    """In the process that is measured: run `coati sft`, its phases noted, up to the end of the
    first step."""
    moments: list[tuple[str, float]] = []
    began = float(os.environ[BEGAN])

    def moment(name: str) -> None:
        moments.append((name, time.monotonic() - began))

    moment("Python is there")
    from coati.recipes.command import run
    from coati.utils import phases

    moment("the command's own modules")
    end = phases.end

    def end_noted(current: Any, *args: Any) -> None:
        end(current, *args)
        # "sft: step 1 of 1" is the progress bar's.
        if not re.search(r": step ", current.what):
            moment(current.what)
        if current.what == "taking the first step":
            found = {"moments": moments, "modules": len(sys.modules)}
            Path(os.environ[NOTES]).write_text(json.dumps(found))
            os._exit(0)

    phases.end = end_noted
    run("sft", sys.argv[2:])


def start(flags: list[str], way: str = "plain") -> dict[str, Any]:
    """What one process noted."""
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "notes.json"
        inside = [str(Path(__file__).resolve()), "--inside", "--save_dir", f"{folder}/run", *flags]
        before = ["-X", "importtime"] if way == "imports" else []
        environment = os.environ | {NOTES: str(notes), BEGAN: str(time.monotonic())}
        environment["PYTHONPATH"] = str(ROOT)
        done = subprocess.run(
            [sys.executable, *before, *inside], env=environment, capture_output=True, text=True
        )
        if not notes.exists():
            raise RuntimeError(f"the run took no step:\n{done.stderr[-3000:]}")
        return json.loads(notes.read_text()) | {"stderr": done.stderr}


def imports_of(stderr: str) -> list[tuple[float, float, int, str]]:
    """(seconds with what it imports, own seconds, depth, module) of -X importtime."""
    found = re.findall(r"import time:\s+(\d+) \|\s+(\d+) \|( +)(\S+)", stderr)
    return [
        (int(all_) / 1e6, int(own) / 1e6, len(space) // 2, name) for own, all_, space, name in found
    ]


def figures(starts: list[dict[str, Any]]) -> dict[str, Any]:
    """The median start, and the moments of the phases in the median."""
    names = [name for name, _ in starts[0]["moments"]]
    by_name = {
        name: statistics.median(dict(map(tuple, each["moments"]))[name] for each in starts)
        for name in names
    }
    ends = [each["moments"][-1][1] for each in starts]
    return {
        "seconds": statistics.median(ends),
        "spread": [min(ends), max(ends)],
        "moments": by_name,
        "modules": starts[-1]["modules"],
    }


def machine() -> str:
    """The processor and its cores."""
    names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return f"{names[0] if names else 'unknown'}, {os.cpu_count()} cores"


def show(found: dict[str, Any]) -> None:
    """A table of the phases."""
    before = 0.0
    for name, at in found["moments"].items():
        print(f"{at:7.2f} s  +{at - before:5.2f}  {name}")
        before = at
    low, high = found["spread"]
    print(
        f"{found['seconds']:.1f} s to the end of the first step ({low:.1f} to {high:.1f}), "
        f"{found['modules']} modules; {machine()}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", help="instead of SmolLM2-135M-Instruct of examples/demo")
    parser.add_argument("--way", choices=WAYS, default="plain")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    model, rows = prepare(args.model)
    flags = arguments(model, rows)
    start(flags)
    if args.way == "imports":
        found = imports_of(start(flags, "imports")["stderr"])
        for seconds, own, depth, name in sorted(found, reverse=True)[:SHOWN]:
            print(f"{seconds:7.2f} {own:7.2f} {depth:3d} {name}")
        return
    result = figures([start(flags) for _ in range(args.repeats)])
    show(result)
    if args.output is not None:
        args.output.write_text(json.dumps({"machine": machine(), **result}, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        noted()
    else:
        main()
