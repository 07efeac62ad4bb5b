"""This checkout beside an earlier one, or beside itself in another environment: SFT, DPO (also of
a 135M model, a pair a step), reward model, PPO, GRPO, data preparation and rollouts.

Each checkout has a process of its own for each case; they take their steps in turn, so whatever
else the machine does slows both. The figure is the median of the ratios of paired steps, seconds
before / seconds now (1.1: ten percent faster), with its 95% interval from order statistics. Of
training also the largest difference between the losses of a step, relative to before's, and the
peak resident memory of the processes; of episodes the ratios of their phases.

    git worktree add ../before REVISION
    python benchmarks/bench_before.py --before ../before [--pairs 10] [--cases sft dpo] [--output F]
    python benchmarks/bench_before.py --before . --before_python .venv-pinned/bin/python
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import online_case, preference_case, sft_case  # noqa: E402
from benchmarks.peer_worker import Worker  # noqa: E402

WARM_UP = 2  # steps before counting begins
PREFERENCE = {  # way, shape and pairs of a step
    "dpo": ("dpo", "28M", 8),
    "dpo_135M": ("dpo", "135M", 1),
    "rm": ("rm", "28M", 8),
}
DATA_ROWS = 40_000  # drawing the report page takes 0.05 s however many rows there are
ROLLOUT = {"batch_size": 16, "prompt_tokens": [16, 200], "max_new_tokens": 64, "model": None}
# A line on standard input: one preparation into a new folder. Works in every release.
PREPARE = """
import json, os, sys, tempfile, time
sys.path[:0] = ["benchmarks", "."]
from pathlib import Path
from benchmarks.bench_data import write_rows
from coati.dataset import prepare_dataset, setup_conversation_template
from data_case import make_tokenizer
data = Path(tempfile.mkdtemp()) / "rows.jsonl"
write_rows("sft", int(sys.argv[1]), data)
tokenizer = make_tokenizer(None)
template = setup_conversation_template(tokenizer, None)
print("ready", flush=True)
for _ in sys.stdin:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        prepare_dataset(inputs=[data], type="sft", tokenizer=tokenizer, template=template,
                        show=None, arrow_dir=Path(folder) / "arrow", cache_dir=Path(folder) / "c")
        print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)
"""


def commands(case: str, steps: int) -> list[str]:
    """The worker of ``case``, started in a checkout."""
    python = [sys.executable]
    if case == "sft":
        sft_case.prepare()
        return [*python, "benchmarks/bench_sft.py", "--paced", "--steps", str(steps)]
    if case in PREFERENCE:
        way, shape, pairs = PREFERENCE[case]
        folder = preference_case.made(49_152, shape=shape)
        words = [str(folder), str(steps), str(pairs)]
        return [*python, "benchmarks/preference_ways.py", way, *words]
    if case in ("ppo", "grpo"):
        folder = online_case.prepare()
        return [*python, "benchmarks/online_ways.py", case, str(folder), str(steps), "1"]
    if case == "rollout":
        return [*python, "benchmarks/rollout_ways.py", "coati", str(steps), repr(ROLLOUT)]
    return [*python, "-c", PREPARE, str(DATA_ROWS)]


TELL_MEMORY = ("sft", *PREFERENCE, "ppo", "grpo")
CASES = (*TELL_MEMORY, "data", "rollout")
PHASES = ("rollout", "scoring", "update")
SHORTEST_PHASE = 0.05  # seconds


def interval_of_median(values: list[float], confidence: float = 0.95) -> tuple[float, float]:
    """A distribution-free interval: the k-th smallest and largest value, k the largest with which
    the binomial(n, 1/2) probability of covering the median is at least ``confidence``."""
    ordered = sorted(values)
    n = len(ordered)
    k = 0
    tail = 0.0
    while k + 1 <= n // 2 and 1 - 2 * (tail + math.comb(n, k) / 2**n) >= confidence:
        tail += math.comb(n, k) / 2**n
        k += 1
    return ordered[max(k - 1, 0)], ordered[n - max(k, 1)]


def compare(case: str, before: Path, pairs: int, python: str = sys.executable) -> dict:
    """``python``: the interpreter of the checkout ``before``."""
    steps = WARM_UP + pairs
    _, *words = commands(case, steps)
    sides = {"now": (sys.executable, sft_case.ROOT), "before": (python, before)}
    workers = {
        name: Worker(name, [program, *words], cwd=root) for name, (program, root) in sides.items()
    }
    for index in range(steps):
        for name in workers if index % 2 else reversed(workers):
            workers[name].step()
    steps_of = {name: worker.steps[WARM_UP:] for name, worker in workers.items()}
    peaks = {name: worker.finish() for name, worker in workers.items() if case in TELL_MEMORY}
    for worker in workers.values():
        worker.process.kill()
    ratios = _ratios(steps_of, "seconds")
    first = steps_of["now"][0]
    phases = [name for name in PHASES if first.get(name, 0) > SHORTEST_PHASE]
    return {
        "seconds": {name: [step["seconds"] for step in each] for name, each in steps_of.items()},
        "ratios": ratios,
        "median": median(ratios),
        "interval": interval_of_median(ratios),
        "peak_memory_mb": peaks,
        "phases": {name: median(_ratios(steps_of, name)) for name in phases},
        "loss_difference": _loss_difference(workers) if "loss" in first else None,
    }


def _ratios(steps: dict[str, list[dict]], name: str) -> list[float]:
    pairs = zip(steps["before"], steps["now"], strict=True)
    return [before[name] / now[name] for before, now in pairs]


def _loss_difference(workers: dict[str, Worker]) -> float:
    pairs = zip(workers["before"].steps, workers["now"].steps, strict=True)
    return max(abs(now["loss"] - before["loss"]) / abs(before["loss"]) for before, now in pairs)


def shown(found: dict) -> str:
    """What there is besides the ratio of a case."""
    parts = [f"{name} {ratio:.3f} x" for name, ratio in found["phases"].items()]
    if found["loss_difference"] is not None:
        parts.append(f"losses differ by {found['loss_difference']:.0e}")
    if peaks := found["peak_memory_mb"]:
        parts.append(f"peaks {peaks['before']:.0f} MiB before, {peaks['now']:.0f} MiB now")
    return "; ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, required=True, help="another checkout")
    parser.add_argument("--before_python", default=sys.executable, help="its interpreter")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--output", help="write the figures as JSON")
    args = parser.parse_args()
    results = {}
    for case in args.cases:
        results[case] = found = compare(
            case, args.before.resolve(), args.pairs, os.path.abspath(args.before_python)
        )
        low, high = found["interval"]
        before, now = (median(found["seconds"][name]) for name in ("before", "now"))
        print(
            f"{case:8s} {found['median']:.3f} x (95% {low:.3f} to {high:.3f}; a step took "
            f"{before:.2f} s before, {now:.2f} s now; load {os.getloadavg()[0]:.1f})",
            flush=True,
        )
        if further := shown(found):
            print(f"         {further}", flush=True)
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
