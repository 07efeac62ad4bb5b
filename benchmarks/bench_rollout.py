"""Rollouts beside transformers' own `generate`: same model, prompts, stop tokens and sampling
settings, in turn.

A 28M-parameter Llama in fp32 (or --model DIR), batches of 16 prompts of 16 to 200 tokens, up to 128
new ones. Answers end at any of the stop tokens, 1 in 48 of the vocabulary, so they are of many
lengths. Each way has a process of its own; they take the batches in turn, greedy and sampled ones
alternating. Tokens are those of the answers, stop token included; a batch begins with its prompts
and ends with the last answer. What is compared:

  coati          the rollout that PPO and GRPO make: a boosted engine (plugin ddp), noise by row,
  log-probs returned, rows replaced as they end transformers   model.generate, which returns no
  log-probs, batch by batch, with eos_token_id the stop tokens, top_k and top_p off

With --prompts N each turn has N prompts of which --batch_size are decoded at once, and answers of
at most a fourth to all of --max_new_tokens; with --equal all prompts are of the longest length and
all answers of --max_new_tokens. --floor prints the time of a token beside its floor as well
(decode_floor.py).

    python benchmarks/bench_rollout.py [--batches 8] [--batch_size 16] [--max_new_tokens 128]
    [--prompts 64] [--equal] [--floor] [--output results.json]
"""

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peer_worker import Worker  # noqa: E402
from benchmarks.rollout_ways import MODES, WAYS  # noqa: E402

WARM_UP = 1  # batches of each mode before counting begins


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--batches", type=int, default=8, help="of each mode, the first not counted"
    )
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument(
        "--prompt_tokens", type=int, nargs=2, default=[16, 200], metavar=("FROM", "TO")
    )
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, help="of a turn; default: --batch_size")
    parser.add_argument("--equal", action="store_true", help="rows of equal lengths")
    parser.add_argument("--floor", action="store_true", help="print shares of the floor, too")
    parser.add_argument("--model", help="a model directory instead of random weights")
    parser.add_argument("--output", help="write the figures as JSON")
    return parser.parse_args()


def in_turn(args: argparse.Namespace) -> dict[str, dict]:
    script = str(Path(__file__).with_name("rollout_ways.py"))
    case = {
        name: getattr(args, name)
        for name in (
            "batch_size",
            "prompt_tokens",
            "max_new_tokens",
            "model",
            "prompts",
            "equal",
        )
    }
    steps = args.batches * len(MODES)
    workers = [Worker(way, [sys.executable, script, way, str(steps), repr(case)]) for way in WAYS]
    for index in range(steps):
        for worker in workers if index // len(MODES) % 2 else reversed(workers):
            worker.step()
    return {
        worker.name: {"steps": worker.steps, "peak_memory_mb": worker.finish()}
        for worker in workers
    }


def rate(steps: list[dict], by: str) -> float:
    """Tokens per second of ``steps``."""
    return sum(step["tokens"] for step in steps) / sum(step[by] for step in steps)


def figures(results: dict[str, dict], mode: str) -> dict:
    """Speeds of each way in ``mode``, their ratio, and how many of the answers are the same."""
    index = MODES.index(mode)
    steps = {way: row["steps"][index :: len(MODES)] for way, row in results.items()}
    counted = {way: some[WARM_UP:] for way, some in steps.items()}
    speed, work = (
        {way: rate(some, by) for way, some in counted.items()}
        for by in ("seconds", "processor_seconds")
    )
    rates = [[rate([s], "seconds") for s in counted[way]] for way in WAYS]
    pairs = zip(*(sum((s["answers"] for s in some), []) for some in steps.values()), strict=True)
    equal = [one == other for one, other in pairs]
    lengths = [length for s in counted["coati"] for length in s["lengths"]]
    return {
        "tokens_per_second": speed,
        "ratio": speed["coati"] / speed["transformers"],
        "ratio_of_processor_time": work["coati"] / work["transformers"],
        "ratios_of_batches": [mine / theirs for mine, theirs in zip(*rates, strict=True)],
        "answer_tokens": {
            "shortest": min(lengths),
            "median": median(lengths),
            "longest": max(lengths),
        },
        "same_answers": sum(equal) / len(equal),
    }


def main() -> None:
    args = parse()
    from coati.models.generation.layout_choice import processor

    print(processor())
    if args.floor:
        script = str(Path(__file__).with_name("decode_floor.py"))
        model = [] if args.model is None else ["--model", args.model]
        subprocess.run([sys.executable, script, *model], check=True)
    results = in_turn(args)
    found = {mode: figures(results, mode) for mode in MODES}
    for mode, row in found.items():
        spread = row["answer_tokens"]
        ratios = row["ratios_of_batches"]
        print(
            f"{mode}, batch {args.batch_size}, answers of {spread['shortest']} to "
            f"{spread['longest']} tokens"
        )
        for way in WAYS:
            print(f"  {way:13s} {row['tokens_per_second'][way]:6.0f} tokens/s")
        same = f"; {row['same_answers']:.0%} of the answers the same" if mode == "greedy" else ""
        print(
            f"  {row['ratio']:.2f} x (batches: {min(ratios):.2f} to {max(ratios):.2f}), by "
            f"processor time {row['ratio_of_processor_time']:.2f} x{same}",
            flush=True,
        )
    if args.output:
        from coati.utils.json_io import save_json

        peaks = {way: row["peak_memory_mb"] for way, row in results.items()}
        save_json({"case": vars(args), "peak_memory_mb": peaks, **found}, args.output)


if __name__ == "__main__":
    main()
