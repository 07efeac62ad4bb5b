"""DPO and the reward model beside TRL 1.16.0: same model, pairs, order, batches and learning rate.

The 28M Llama of bench_sft.py and the pairs of examples/data/preference.jsonl as token ids. Each
system runs in an environment and a process of its own, with all cores; they take their steps in
turn, so whatever else the machine does slows both. Tokens are real tokens: padding counts for
neither. TRL gets the settings that are fastest here (fp32, no gradient checkpointing);
--trl_defaults leaves it its own (bf16, checkpointing).

    python benchmarks/bench_preference_peers.py [--steps 12] [--trl_env DIR] [--trl_python PATH]
    [--output results.json]
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import preference_case as case  # noqa: E402
from benchmarks import sft_case  # noqa: E402
from benchmarks.bench_dpo import WARM_UP, command, in_turn, largest_difference, speed  # noqa: E402
from benchmarks.bench_sft_peers import trl_python  # noqa: E402

HERE = Path(__file__).resolve().parent


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--pairs", type=int, default=8, help="pairs of a step")
    parser.add_argument("--algorithm", nargs="+", choices=("dpo", "rm"), default=["dpo", "rm"])
    parser.add_argument(
        "--tokenizer_dir", help="default: SmolLM2, made by examples/demo/smollm2.py"
    )
    parser.add_argument(
        "--trl_env",
        type=Path,
        default=sft_case.ROOT / ".venv-trl",
        help="built when it is not there",
    )
    parser.add_argument(
        "--trl_python", help="the Python of an environment that exists, instead of --trl_env"
    )
    parser.add_argument("--trl_defaults", action="store_true")
    parser.add_argument("--output", help="write the figures as JSON")
    return parser.parse_args()


def compare(algorithm: str, folder: Path, python: str, args: argparse.Namespace) -> dict:
    theirs = [
        python,
        str(HERE / "trl_preferences.py"),
        algorithm,
        str(folder),
        str(args.steps),
        str(args.pairs),
    ]
    commands = {
        "coati": command(algorithm, folder, args.steps, args.pairs),
        "trl": [*theirs, *["--defaults"] * args.trl_defaults],
    }
    results: dict = in_turn(commands, args.steps)
    one = results["coati"]
    other = results["trl"]
    return results | {
        "tokens_per_second_ratio": one["tokens_per_second"] / other["tokens_per_second"],
        "median_ratio_of_steps": speed(results, "coati", "trl"),
        "memory_ratio": one["peak_memory_mb"] / other["peak_memory_mb"],
        "largest_relative_loss_difference": largest_difference(results, "coati", "trl"),
        "trl_defaults": args.trl_defaults,
    }


def show(algorithm: str, result: dict, args: argparse.Namespace) -> None:
    settings = "with its own defaults" if args.trl_defaults else "in fp32 without checkpointing"
    steps = args.steps - WARM_UP
    print(
        f"{algorithm} of a 28M Llama, {args.pairs} pairs a step, {steps} steps in turn; TRL 1.16.0 "
        f"{settings}"
    )
    for name in ("coati", "trl"):
        row = result[name]
        print(
            f"{name:6s} {row['tokens_per_second']:6.0f} tokens/s   peak "
            f"{row['peak_memory_mb']:5.0f} MiB   loss {row['losses'][0]:.4f} -> "
            f"{row['losses'][-1]:.4f}"
        )
    print(
        f"{result['tokens_per_second_ratio']:.1f} x TRL's tokens/s (median of the steps "
        f"{result['median_ratio_of_steps']:.1f}) with {result['memory_ratio']:.0%} of its memory; "
        f"losses differ by at most {result['largest_relative_loss_difference']:.1e} of their value",
        flush=True,
    )


def main() -> None:
    args = parse()
    python = args.trl_python or trl_python(args.trl_env)
    folder = case.real(args.tokenizer_dir)
    results = {}
    for algorithm in args.algorithm:
        results[algorithm] = compare(algorithm, folder, python, args)
        show(algorithm, results[algorithm], args)
    if args.output:
        from coati.utils.json_io import save_json

        save_json(results, args.output)


if __name__ == "__main__":
    main()
