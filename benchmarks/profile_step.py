"""Where the time of a step and of a token goes, beside the least that this machine could need.

Steps of an ordinary engine (plugin ddp, fp32, one process) run through the library, the same work
every time. Most are timed as they are; the times of steps under torch.profiler, in turn with
them, say which part took how much. Parts are operators' own times; what is left of the
unprofiled time is Python's. The floors are computed from the mathematics of the work:

  arithmetic   its floating-point operations at this machine's own fp32 matrix rate
  memory       the bytes that must pass (weights and caches read once) at its own bandwidth

both measured between the steps of the same run, so another job on the machine slows both.

    python benchmarks/profile_step.py [sft dpo rm ppo grpo decode_1 decode_8 decode_16 decode_32]
    [--shape 28M] [--steps 10] [--output F] [--compare BEFORE.json]
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import op_classes, profile_case  # noqa: E402
from benchmarks.bench_ppo import SHAPES  # noqa: E402
from benchmarks.machine_rates import MachineRates, bandwidth  # noqa: E402
from benchmarks.op_classes import PARTS, PYTHON, Found  # noqa: E402
from benchmarks.profile_table import table  # noqa: E402
from benchmarks.work_floors import Work, as_json  # noqa: E402

WARM_UP = 2


class Timed:
    """A recorder: after ``warm_up`` steps, ``steps`` as they are and ``profiled`` under the
    profiler, in turn."""

    def __init__(self, steps: int, profiled: int, vocabulary: int, rates: Any, warm_up=WARM_UP):
        self.steps = warm_up + steps + profiled
        self.vocabulary = vocabulary
        self.rates = rates
        self.plans = ["warm"] * warm_up + turns(steps, profiled)
        self.taken: dict[str, int] = {}
        self.plain: dict[str, list[dict[str, float]]] = {}
        self.under: dict[str, list[float]] = {}
        self.found: dict[str, list[Found]] = {}
        self.profiler: Any = None

    def begin(self, kind: str = "step") -> None:
        index = self.taken.get(kind, 0)
        self.kind = kind
        self.plan = self.plans[index]
        self.taken[kind] = index + 1
        if self.plan == "plain":
            self.rates.measure()
        elif self.plan == "profiled":
            gc.collect()
            self._profile()
        self.processor = time.process_time()
        self.thread = time.thread_time()
        self.wall = time.perf_counter()

    def _profile(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        self.profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
        self.profiler.start()

    def end(self, **found: float) -> None:
        taken = {
            "seconds": time.perf_counter() - self.wall,
            "thread": time.thread_time() - self.thread,
            "processor": time.process_time() - self.processor,
        }
        if self.plan == "plain":
            self.plain.setdefault(self.kind, []).append({**found, **taken})
        elif self.plan == "profiled":
            self.profiler.stop()
            self.under.setdefault(self.kind, []).append(taken["seconds"])
            events = self.profiler.events()
            self.found.setdefault(self.kind, []).append(
                op_classes.attribute(events, self.vocabulary)
            )
            self.profiler = None


def turns(steps: int, profiled: int) -> list[str]:
    """``profiled`` among ``steps`` plain ones, spread evenly."""
    plans: list[str] = []
    for index in range(steps):
        plans.append("plain")
        plans += ["profiled"] * ((index + 1) * profiled // steps - index * profiled // steps)
    return plans


def medians_of(found: list[Found], read: Callable[[Found], dict]) -> dict[Any, Any]:
    """Key by key, over the profiled steps; what a step lacks counts as zero."""
    keys = dict.fromkeys(key for each in found for key in read(each))
    return {key: median(read(each).get(key, 0.0) for each in found) for key in keys}


def difference(one: dict, other: dict, per: int) -> dict:
    """(one - other) / per, key by key."""
    return {key: (one.get(key, 0.0) - other.get(key, 0.0)) / per for key in {**one, **other}}


def reduced(timed: Timed, done: profile_case.Done, read: Callable[[str], dict]) -> dict:
    """``read`` of the only kind of step; or of the difference between two, for one token."""
    first = read(done.kinds[0])
    if len(done.kinds) == 1:
        return first
    return difference(first, read(done.kinds[1]), done.per)


def whole_of(timed: Timed, done: profile_case.Done) -> dict[str, Any]:
    """Times of a unit of work: medians, and the middle half of them."""

    def read(kind: str) -> dict[str, float]:
        names = {name: 0 for step in timed.plain[kind] for name in step}
        return {name: median(step[name] for step in timed.plain[kind]) for name in names}

    found = reduced(timed, done, read)
    if len(done.kinds) == 1:
        each = [step["seconds"] for step in timed.plain[done.kinds[0]]]
    else:
        sides = [[step["seconds"] for step in timed.plain[kind]] for kind in done.kinds]
        each = [(one - other) / done.per for one, other in zip(*sides, strict=True)]
    ordered = sorted(each)
    return found | {"quartiles": [ordered[len(ordered) * k // 4] for k in (1, 3)], "each": each}


def split(whole: float, parts: dict[str, float]) -> dict[str, float]:
    """``parts`` of operators with Python's, the rest of ``whole``; where the operators took longer
    under the profiler than the whole step does without it, ``over``, a negative number, says by how
    much. All of them sum to ``whole``."""
    found = {part: parts.get(part, 0.0) for part in PARTS if part != PYTHON}
    rest = whole - sum(found.values())
    return found | {PYTHON: max(rest, 0.0), "over": min(rest, 0.0)}


def figures(timed: Timed, done: profile_case.Done) -> dict[str, Any]:
    rates = timed.rates.medians()
    whole = whole_of(timed, done)

    def of(read: Callable[[Found], dict]) -> dict:
        return reduced(timed, done, lambda kind: medians_of(timed.found[kind], read))

    parts = split(whole["seconds"], of(lambda found: found.parts))
    times = of(lambda found: {key: value[0] for key, value in found.operators.items()})
    calls = of(lambda found: {key: value[1] for key, value in found.operators.items()})
    operators = [
        {"part": key[0], "name": key[1], "seconds": times[key], "calls": calls[key]}
        for key in sorted(times, key=lambda key: -times[key])
    ]
    under = reduced(timed, done, lambda kind: {"seconds": median(timed.under[kind])})["seconds"]
    return {
        "unit": done.unit,
        "tokens": done.tokens,
        "steps": len(timed.plain[done.kinds[0]]),
        "profiled": len(timed.found[done.kinds[0]]),
        **whole,
        "profiled_seconds": under,
        "parts": parts,
        "operators": operators[:60],
        "products": products_of(of)[:30],
        "rates": rates,
        "floors": floors(done.pieces, rates["matmul"], bandwidth(rates)),
        "floors_onednn": floors(done.pieces, rates.get("onednn"), bandwidth(rates)),
        "floors_prompts_once": floors(done.alternative, rates["matmul"], bandwidth(rates)),
        "load_average": os.getloadavg()[0],
    }


def products_of(of: Callable[[Callable[[Found], dict]], dict]) -> list[dict[str, Any]]:
    """Matrix products by their sizes, the longest first."""
    seconds = of(lambda found: {key: value[0] for key, value in found.products.items()})
    calls = of(lambda found: {key: value[1] for key, value in found.products.items()})
    return [
        {
            "size": str(key),
            "calls": calls[key],
            "seconds": seconds[key],
            "gflops": key.flops * calls[key] / seconds[key] / 1e9,
        }
        for key in sorted(seconds, key=lambda key: -seconds[key])
        if calls[key] > 0 and seconds[key] > 0
    ]


def floors(
    pieces: dict[str, list[Work]] | None, flop_rate: float | None, byte_rate: float
) -> dict[str, Any] | None:
    """By piece and in all; None where the pieces or the rate are not known."""
    if pieces is None or flop_rate is None:
        return None
    found = {name: as_json(work, flop_rate, byte_rate) for name, work in pieces.items()}
    every = [each for work in pieces.values() for each in work]
    return {"pieces": found, **as_json(every, flop_rate, byte_rate)}


def measure(name: str, shape: str, steps: int, profiled: int) -> dict[str, Any]:
    """In this process."""
    case = profile_case.cases()[name]
    timed = Timed(steps, profiled, SHAPES[shape]["vocab_size"], MachineRates())
    with op_classes.marked():
        done = case(shape, timed)
    return figures(timed, done)


def in_process(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The same in a process of its own: what one case leaves in memory slows none of the others."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        words = [sys.executable, __file__, name, "--worker", "--output", str(output)]
        words += ["--shape", args.shape, "--steps", str(args.steps)]
        words += ["--profiled", str(args.profiled)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"profile_step.py: {name} ended with code {done.returncode}\n{done.stderr}")
        return json.loads(output.read_text(encoding="utf-8"))


def parse() -> argparse.Namespace:
    known = profile_case.cases()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(known)}; all")
    parser.add_argument("--shape", choices=SHAPES, default="28M")
    parser.add_argument("--steps", type=int, default=10, help="as they are, of each case")
    parser.add_argument("--profiled", type=int, default=4, help="more of them, under the profiler")
    parser.add_argument("--output", help="write the figures as JSON")
    parser.add_argument("--compare", type=Path, metavar="BEFORE", help="what --output wrote")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := [name for name in args.cases if name not in known]:
        parser.error(f"no case {unknown[0]!r}; there are {', '.join(known)}")
    if min(args.steps, args.profiled) < 1:
        parser.error("--steps and --profiled are at least 1")
    args.cases = args.cases or list(known)
    return args


def main() -> None:
    args = parse()
    if args.worker:
        found = measure(args.cases[0], args.shape, args.steps, args.profiled)
        Path(args.output).write_text(json.dumps(found), encoding="utf-8")
        return
    from benchmarks.data_case import machine_with_torch

    before = json.loads(args.compare.read_text(encoding="utf-8")) if args.compare else {"cases": {}}
    about = machine_with_torch()
    print(f"a {args.shape} Llama in fp32", flush=True)
    results: dict[str, Any] = {"machine": about, "shape": args.shape, "cases": {}}
    for name in args.cases:
        results["cases"][name] = row = in_process(name, args)
        print(table(name, row, before["cases"].get(name)), flush=True)
        if args.output:
            Path(args.output).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
