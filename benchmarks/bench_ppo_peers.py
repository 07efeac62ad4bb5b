"""PPO beside TRL 1.12.0, the last with a PPO trainer, and GRPO beside the newest TRL: same torch
and transformers, models, prompts and settings.

Llamas of random weights with SmolLM2's vocabulary of 49,152, prompts of 159 to 185 tokens. PPO:
8 prompts, 48 new tokens each, with reward model, critic and reference; GRPO: 8 answers of 64
tokens, 4 to each of 2 prompts, scored by a function. Each system runs in a process of its own, with
all cores; they take their episodes in turn, so whatever else the machine does slows both. An
episode is everything: sampling, scoring, update. TRL gets the settings that are fastest here (fp32,
no gradient checkpointing, the fused AdamW); --trl_defaults leaves it its own (bf16, checkpointing).

The floor is the time that this machine's matrix products alone would take: the arithmetic of an
episode by mathematics (online_case.flops) at the rate of a large product, measured between the
episodes. No system can be faster.

    python benchmarks/bench_ppo_peers.py [--episodes 11] [--shape 28M] [--algorithm ppo grpo]
        [--output results.json]
"""

import argparse
import os
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median, quantiles

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import online_case as case  # noqa: E402
from benchmarks import sft_case  # noqa: E402
from benchmarks.bench_ppo import SHAPES  # noqa: E402
from benchmarks.bench_sft_peers import (  # noqa: E402
    about,
    end,
    heading,
    more_than,
    need_default_set,
    trl_folder,
    trl_release,
)
from benchmarks.peer_worker import Worker, take_turns  # noqa: E402

HERE = Path(__file__).resolve().parent
WARM_UP = 1  # episodes before counting begins
REQUIREMENTS = {"ppo": "requirements-trl-ppo.txt", "grpo": "requirements-trl.txt"}
FOLDERS = {"ppo": ".trl-ppo", "grpo": ".trl"}
PHASES = ("rollout", "scoring", "update")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--episodes", type=more_than(WARM_UP), default=11, help="the first is not counted"
    )
    parser.add_argument(
        "--passes", type=int, default=1, help="updates with the answers of an episode"
    )
    parser.add_argument("--shape", choices=SHAPES, default="28M")
    parser.add_argument("--algorithm", nargs="+", choices=REQUIREMENTS, default=list(REQUIREMENTS))
    for algorithm, folder in FOLDERS.items():
        flag = "--trl" if algorithm == "grpo" else "--trl_ppo"
        parser.add_argument(
            flag,
            type=Path,
            default=sft_case.ROOT / folder,
            help=f"the folder of {algorithm.upper()}'s TRL, filled when it is not there",
        )
    parser.add_argument("--trl_defaults", action="store_true")
    parser.add_argument("--output", help="write the figures as JSON")
    return parser.parse_args()


def site_of(algorithm: str, args: argparse.Namespace) -> Path:
    folder = args.trl_ppo if algorithm == "ppo" else args.trl
    return trl_folder(folder, REQUIREMENTS[algorithm])


def compare(algorithm: str, folder: Path, site: Path, args: argparse.Namespace) -> dict:
    size = replace(case.SIZES[algorithm], passes=args.passes)
    words = [str(folder), str(args.episodes), str(args.passes)]
    theirs = [str(HERE / f"trl_{algorithm}.py"), *words, *["--defaults"] * args.trl_defaults]
    ours = [sys.executable, str(HERE / "online_ways.py"), algorithm, *words]
    makers = {
        "coati": partial(Worker, "coati", ours),
        "trl": partial(Worker, "trl", [sys.executable, *theirs], site=site),
    }
    products = sft_case.MatmulRate()
    rates: list[float] = []
    turns = take_turns(makers, args.episodes, between=lambda: rates.append(products.measure()))
    results: dict = {
        name: figures(steps, size, turns.peaks[name]) for name, steps in turns.steps.items()
    }
    lengths = [len(row["input_ids"]) for row in case.read(folder, size)]
    needed = case.flops(algorithm, size, lengths, SHAPES[args.shape])
    compared = {
        "size": asdict(size),
        "shape": args.shape,
        "about": about() | {"trl": trl_release(REQUIREMENTS[algorithm])},
        "trl_defaults": args.trl_defaults,
        "failed": turns.failed,
    }
    return results | compared | outcome(results, needed, rates)


def outcome(results: dict, needed: float, rates: list[float]) -> dict:
    """Ratios where TRL ran to its end, and the floor of ``needed`` operations at the median of
    ``rates``."""
    return (beside_trl(results) if "trl" in results else {}) | {
        "gflop_of_an_episode": needed / 1e9,
        "matmul_gflops": median(rates) / 1e9,
        "floor_seconds": needed / median(rates),
        "load_average": os.getloadavg()[0],
    }


def beside_trl(results: dict) -> dict:
    ratios = {name: ratios_of(results, name) for name in ("seconds", "processor_seconds")}
    some = ratios["seconds"]
    low, _, high = quantiles(some, n=4) if len(some) > 1 else some * 3
    return {
        "ratio_of_each_episode": some,
        "ratio": median(some),
        "quartiles": [low, high],
        "ratio_of_processor_seconds": median(ratios["processor_seconds"]),
        "memory_ratio": results["coati"]["peak_memory_mb"] / results["trl"]["peak_memory_mb"],
    }


def ratios_of(results: dict, name: str) -> list[float]:
    """TRL's by ours, of each counted episode."""
    one, other = (results[way][name][WARM_UP:] for way in ("coati", "trl"))
    return [theirs / mine for mine, theirs in zip(one, other, strict=True)]


def figures(steps: list[dict], size: case.Size, peak: float) -> dict:
    counted = steps[WARM_UP:]
    found = {
        "seconds": [step["seconds"] for step in steps],
        "processor_seconds": [step["processor_seconds"] for step in steps],
        "samples_per_second": size.answers / median(step["seconds"] for step in counted),
        "peak_memory_mb": peak,
        "rewards": [step["reward"] for step in steps],
    }
    if all(phase in step for step in steps for phase in PHASES):
        whole = sum(step["seconds"] for step in counted)
        found["shares"] = {phase: sum(step[phase] for step in counted) / whole for phase in PHASES}
    return found


def show(algorithm: str, result: dict) -> None:
    size = result["size"]
    answers = size["prompts"] * size["generations"]
    print(
        f"{algorithm} of {result['shape']} Llamas, {answers} answers of {size['new']} tokens; "
        f"{heading(result['about'])}"
    )
    for name in ("coati", "trl"):
        if name not in result:
            continue
        row = result[name]
        seconds = median(row["seconds"][WARM_UP:])
        parts = ", ".join(f"{phase} {share:.0%}" for phase, share in row.get("shares", {}).items())
        print(
            f"{name:6s} {seconds:5.1f} s an episode, {row['samples_per_second']:.2f} samples/s, "
            f"peak {row['peak_memory_mb']:.0f} MiB{f' ({parts})' if parts else ''}"
        )
    if "ratio" in result:
        low, high = result["quartiles"]
        print(
            f"{result['ratio']:.1f} x as fast (quartiles {low:.1f} to {high:.1f}; processor time: "
            f"{result['ratio_of_processor_seconds']:.1f}) with {result['memory_ratio']:.0%} of its "
            "memory"
        )
    print(
        f"the floor of the arithmetic is {result['floor_seconds']:.1f} s: "
        f"{result['gflop_of_an_episode']:.0f} Gflop at the {result['matmul_gflops']:.0f} Gflop/s "
        "of a matrix product",
        flush=True,
    )


def main() -> None:
    args = parse()
    need_default_set()
    folder = case.prepare(shape=args.shape)
    results = {}
    failed = {}
    for algorithm in args.algorithm:
        results[algorithm] = found = compare(algorithm, folder, site_of(algorithm, args), args)
        failed |= {f"{algorithm}, {name}": why for name, why in found["failed"].items()}
        show(algorithm, found)
        if args.output:
            from coati.utils.json_io import save_json

            save_json(results, args.output)
    end(failed)


if __name__ == "__main__":
    main()
