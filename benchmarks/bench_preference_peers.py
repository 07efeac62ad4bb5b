"""DPO and the reward model beside TRL: same torch and transformers, model, pairs, order, batches
and learning rate.

The Llama of --shape and the pairs of examples/data/preference.jsonl as token ids; DPO has a live
reference on both sides. How the systems take their steps, and what TRL is given, is as in
bench_sft_peers.py; --trl_defaults leaves TRL its own settings (bf16, checkpointing).

    python benchmarks/bench_preference_peers.py [--steps 12] [--shape 28M] [--algorithm dpo rm]
    [--output results.json]
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import preference_case as case  # noqa: E402
from benchmarks.bench_dpo import command  # noqa: E402
from benchmarks.bench_ppo import SHAPES  # noqa: E402
from benchmarks.bench_sft_peers import (  # noqa: E402
    WARM_UP,
    about,
    add_trl_flags,
    beside_ours,
    end,
    heading,
    more_than,
    need_default_set,
    show,
    trl_folder,
)
from benchmarks.peer_worker import Worker, take_turns  # noqa: E402

HERE = Path(__file__).resolve().parent


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=more_than(WARM_UP), default=12)
    parser.add_argument("--shape", choices=SHAPES, default="28M")
    parser.add_argument("--pairs", type=int, default=8, help="pairs of a step")
    parser.add_argument("--algorithm", nargs="+", choices=("dpo", "rm"), default=["dpo", "rm"])
    parser.add_argument(
        "--tokenizer_dir", help="default: SmolLM2, made by examples/demo/smollm2.py"
    )
    add_trl_flags(parser)
    parser.add_argument("--output", help="write the figures as JSON")
    return parser.parse_args()


def compare(algorithm: str, folder: Path, site: Path, args: argparse.Namespace) -> dict:
    words = [algorithm, str(folder), str(args.steps), str(args.pairs)]
    words += ["--defaults"] * args.trl_defaults
    theirs = [sys.executable, str(HERE / "trl_preferences.py"), *words]
    makers = {
        "coati": partial(Worker, "coati", command(algorithm, folder, args.steps, args.pairs)),
        "trl": partial(Worker, "trl", theirs, site=site),
    }
    return beside_ours(take_turns(makers, args.steps))


def main() -> None:
    args = parse()
    need_default_set()
    site = trl_folder(args.trl)
    folder = case.real(args.tokenizer_dir, args.shape)
    results: dict = {
        "about": about(),
        "shape": args.shape,
        "pairs": args.pairs,
        "trl_defaults": args.trl_defaults,
    }
    failed = {}
    for algorithm in args.algorithm:
        results[algorithm] = found = compare(algorithm, folder, site, args)
        failed |= {f"{algorithm}, {name}": why for name, why in found["failed"].items()}
        print(
            f"{algorithm} of a {args.shape} Llama, {args.pairs} pairs a step, "
            f"{args.steps - WARM_UP} steps in turn; {heading(results['about'])}"
        )
        show(found, found["beside"])
        if args.output:
            from coati.utils.json_io import save_json

            save_json(results, args.output)
    end(failed)


if __name__ == "__main__":
    main()
