"""PPO beside TRL 1.9.2, the last with a PPO trainer, and GRPO beside TRL 1.16.0: same models,
prompts and settings.

28M Llamas of random weights with SmolLM2's vocabulary of 49,152, prompts of 159 to 185 tokens. PPO:
8 prompts, 48 new tokens each, with reward model, critic and reference; GRPO: 8 answers of 64
tokens, 4 to each of 2 prompts, scored by a function. Each system runs in an environment and a
process of its own, with all cores; they take their episodes in turn, so whatever else the machine
does slows both. An episode is everything: sampling, scoring, update. TRL gets the settings that are
fastest here (fp32, no gradient checkpointing); --trl_defaults leaves it its own (bf16,
checkpointing).

The floor is the time that this machine's matrix products alone would take: the arithmetic of an
episode by mathematics (online_case.flops) at the rate of a large product, measured between the
episodes. No system can be faster.

    python benchmarks/bench_ppo_peers.py [--episodes 5] [--algorithm ppo grpo] [--trl_python PATH]
        [--trl_ppo_python PATH] [--output results.json]
"""

import argparse
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import online_case as case  # noqa: E402
from benchmarks import sft_case  # noqa: E402
from benchmarks.bench_sft_peers import Worker, trl_python  # noqa: E402

HERE = Path(__file__).resolve().parent
WARM_UP = 1  # episodes before counting begins
VERSIONS = {"ppo": "1.9.2", "grpo": "1.16.0"}
ENVIRONMENTS = {
    "ppo": (".venv-trl-ppo", "requirements-trl-ppo.txt"),
    "grpo": (".venv-trl", "requirements-trl.txt"),
}
PHASES = ("rollout", "scoring", "update")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--episodes", type=int, default=5, help="the first is not counted")
    parser.add_argument(
        "--passes", type=int, default=1, help="updates with the answers of an episode"
    )
    parser.add_argument("--algorithm", nargs="+", choices=VERSIONS, default=list(VERSIONS))
    parser.add_argument(
        "--trl_python", help="the Python of an environment with TRL 1.16.0, instead of .venv-trl"
    )
    parser.add_argument(
        "--trl_ppo_python", help="the same with TRL 1.9.2, instead of .venv-trl-ppo"
    )
    parser.add_argument("--trl_defaults", action="store_true")
    parser.add_argument("--output", help="write the figures as JSON")
    return parser.parse_args()


def python_of(algorithm: str, args: argparse.Namespace) -> str:
    folder, requirements = ENVIRONMENTS[algorithm]
    given = args.trl_ppo_python if algorithm == "ppo" else args.trl_python
    return given or trl_python(sft_case.ROOT / folder, requirements)


def compare(algorithm: str, folder: Path, python: str, args: argparse.Namespace) -> dict:
    size = replace(case.SIZES[algorithm], passes=args.passes)
    words = [str(folder), str(args.episodes), str(args.passes)]
    workers = [
        Worker("coati", [sys.executable, str(HERE / "online_ways.py"), algorithm, *words]),
        Worker(
            "trl",
            [
                python,
                str(HERE / f"trl_{algorithm}.py"),
                *words,
                *["--defaults"] * args.trl_defaults,
            ],
        ),
    ]
    products = sft_case.MatmulRate()
    rates = []
    for index in range(args.episodes):
        for worker in workers if index % 2 else reversed(workers):
            worker.step()
            rates.append(products.measure())
    results: dict = {
        worker.name: figures(worker.steps, size, worker.finish()) for worker in workers
    }
    needed = case.flops(algorithm, size, [len(row["input_ids"]) for row in case.read(folder, size)])
    about = {
        "size": asdict(size),
        "trl_version": VERSIONS[algorithm],
        "trl_defaults": args.trl_defaults,
    }
    return results | about | outcome(results, needed, rates)


def outcome(results: dict, needed: float, rates: list[float]) -> dict:
    """Ratios, and the floor of ``needed`` operations at the median of ``rates``."""
    ratios = {name: ratios_of(results, name) for name in ("seconds", "processor_seconds")}
    return {
        "ratio_of_each_episode": ratios["seconds"],
        "ratio": median(ratios["seconds"]),
        "ratio_of_processor_seconds": median(ratios["processor_seconds"]),
        "memory_ratio": results["coati"]["peak_memory_mb"] / results["trl"]["peak_memory_mb"],
        "gflop_of_an_episode": needed / 1e9,
        "matmul_gflops": median(rates) / 1e9,
        "floor_seconds": needed / median(rates),
        "load_average": os.getloadavg()[0],
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
    version = result["trl_version"]
    settings = (
        "with its own defaults" if result["trl_defaults"] else "in fp32 without checkpointing"
    )
    answers = size["prompts"] * size["generations"]
    print(
        f"{algorithm} of 28M Llamas, {answers} answers of {size['new']} tokens; TRL {version} "
        f"{settings}"
    )
    for name in ("coati", "trl"):
        row = result[name]
        seconds = median(row["seconds"][WARM_UP:])
        parts = ", ".join(f"{phase} {share:.0%}" for phase, share in row.get("shares", {}).items())
        print(
            f"{name:6s} {seconds:5.1f} s an episode, {row['samples_per_second']:.2f} samples/s, "
            f"peak {row['peak_memory_mb']:.0f} MiB{f' ({parts})' if parts else ''}"
        )
    ratios = result["ratio_of_each_episode"]
    print(
        f"{result['ratio']:.1f} x as fast (episodes: {min(ratios):.1f} to {max(ratios):.1f}; "
        f"processor time: {result['ratio_of_processor_seconds']:.1f}) with "
        f"{result['memory_ratio']:.0%} of its memory\n"
        f"the floor of the arithmetic is {result['floor_seconds']:.1f} s: "
        f"{result['gflop_of_an_episode']:.0f} Gflop at the {result['matmul_gflops']:.0f} Gflop/s "
        "of a matrix product",
        flush=True,
    )


def main() -> None:
    args = parse()
    folder = case.prepare()
    results = {}
    for algorithm in args.algorithm:
        results[algorithm] = compare(algorithm, folder, python_of(algorithm, args), args)
        show(algorithm, results[algorithm])
    if args.output:
        from coati.utils.json_io import save_json

        save_json(results, args.output)


if __name__ == "__main__":
    main()
