"""Memory and time of a DPO step and of a reward model's step, beside plain PyTorch on the same
model and rows.

A 28M-parameter Llama in fp32 with a vocabulary of 49,152 or 151,936; pairs of random tokens whose
prompts are twice as long as their answers. What is compared is described in preference_ways.py.
Each way has a process of its own; they take their steps in turn, so whatever else the machine does
slows all, and a ratio is the median of the ratios of single steps, which all ways take on the same
rows. Tokens are real tokens: padding counts for none. Peak memory is the highest resident set of
the process, interpreter, libraries, weights and optimizer included.

    python benchmarks/bench_dpo.py [--steps 6] [--vocabulary 49152 151936] [--algorithm dpo rm]
    [--output results.json]
"""

import argparse
import sys
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import preference_case as case  # noqa: E402
from benchmarks.peer_worker import Worker  # noqa: E402

HERE = Path(__file__).resolve().parent
WARM_UP = 2  # steps before counting begins
WAYS = {"dpo": ("dpo", "dpo_stored", "dpo_plain"), "rm": ("rm", "rm_plain")}
PAIRS = {
    49_152: 8
}  # of a step, by vocabulary: full logits of more would not fit into many a machine
FEWER = 4  # for every other vocabulary


def command(way: str, folder: Path, steps: int, pairs: int) -> list[str]:
    return [
        sys.executable,
        str(HERE / "preference_ways.py"),
        way,
        str(folder),
        str(steps),
        str(pairs),
    ]


def in_turn(commands: dict[str, list[str]], steps: int) -> dict[str, dict]:
    """``steps`` steps of each way, in turn; the order is turned round each time."""
    workers = [Worker(name, words) for name, words in commands.items()]
    for index in range(steps):
        for worker in workers if index % 2 else reversed(workers):
            worker.step()
    return {worker.name: figures(worker.steps, worker.finish()) for worker in workers}


def figures(steps: list[dict], peak: float) -> dict:
    counted = steps[WARM_UP:]
    tokens = sum(step["tokens"] for step in counted)
    return {
        "tokens_per_second": tokens / sum(step["seconds"] for step in counted),
        "peak_memory_mb": peak,
        "supervised_share_of_tokens": sum(step["supervised"] for step in counted) / tokens,
        "seconds": [step["seconds"] for step in steps],
        "losses": [step["loss"] for step in steps],
    }


def speed(results: dict[str, dict], one: str, other: str) -> float:
    """How many times as fast ``one`` is: the median over the counted steps."""
    seconds = [results[name]["seconds"][WARM_UP:] for name in (one, other)]
    return median(theirs / mine for mine, theirs in zip(*seconds, strict=True))


def largest_difference(results: dict[str, dict], one: str, other: str) -> float:
    """Between the losses of single steps, relative to ``other``'s."""
    losses = zip(results[one]["losses"], results[other]["losses"], strict=True)
    return max(abs(a - b) / abs(b) for a, b in losses)


def compare(vocabulary: int, ways: tuple[str, ...], steps: int, pairs: int) -> dict:
    """Figures of each way, and of the first beside the last, which is plain PyTorch."""
    folder = case.made(vocabulary)
    one = ways[0]
    plain = ways[-1]
    results: dict = in_turn({way: command(way, folder, steps, pairs) for way in ways}, steps)
    results["ratios"] = {
        "to_plain": speed(results, one, plain),
        "memory": results[one]["peak_memory_mb"] / results[plain]["peak_memory_mb"],
        "loss_difference": largest_difference(results, one, plain),
        **({"stored_to_live": speed(results, "dpo_stored", "dpo")} if "dpo_stored" in ways else {}),
    }
    return results


def show(what: str, results: dict) -> None:
    print(what)
    for way, row in results.items():
        if way != "ratios":
            print(
                f"  {way:10s} {row['tokens_per_second']:6.0f} tokens/s   peak "
                f"{row['peak_memory_mb']:6.0f} MiB"
            )
    found = results["ratios"]
    again = (
        f"; stored log-probs: {found['stored_to_live']:.2f} x again"
        if "stored_to_live" in found
        else ""
    )
    print(
        f"  {found['to_plain']:.2f} x the tokens/s of plain PyTorch with {found['memory']:.0%} of "
        f"its peak memory (losses differ by {found['loss_difference']:.0e} of their value){again}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[49_152, 151_936])
    parser.add_argument("--algorithm", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--output", help="write the figures as JSON")
    args = parser.parse_args()
    results: dict = {}
    for vocabulary in args.vocabulary:
        pairs = PAIRS.get(vocabulary, FEWER)
        for algorithm in args.algorithm:
            found = compare(vocabulary, WAYS[algorithm], args.steps, pairs)
            tokens = case.PROMPT + case.ANSWER
            show(
                f"{algorithm}, vocabulary {vocabulary}, {pairs} pairs of 2 x {tokens} tokens", found
            )
            results.setdefault(algorithm, {})[str(vocabulary)] = found
    if args.output:
        from coati.utils.json_io import save_json

        save_json(results, args.output)


if __name__ == "__main__":
    main()
