"""SFT beside TRL and transformers' own Trainer: same torch and transformers, model, rows, order,
batches and learning rate, all on the assistant's tokens only.

TRL is installed without what it needs into a folder (.trl), so both sides run with this
environment's packages. Each system is a process of its own, with all cores; they take their steps
in turn, so whatever else the machine does slows all, and a ratio is the median of the ratios of
single steps, which all take on the same rows. Tokens are real tokens: padding counts for none. The
others get the settings that are fastest on a CPU (sft_peers.py); --trl_defaults leaves TRL its own.

    python benchmarks/bench_sft_peers.py [--steps 12] [--shape 28M] [--peers trl transformers]
    [--output results.json]
"""

import argparse
import hashlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import sft_case  # noqa: E402
from benchmarks.bench_ppo import SHAPES  # noqa: E402
from benchmarks.peer_worker import Turns, Worker, take_turns  # noqa: E402

HERE = Path(__file__).resolve().parent
WARM_UP = 2  # steps before counting begins
PEERS = ("trl", "trl_padding_free", "transformers")


def more_than(warm_up: int) -> Callable[[str], int]:
    """The type of a flag that counts ``warm_up`` steps which are not counted, too."""

    def count(text: str) -> int:
        if (found := int(text)) <= warm_up:
            raise argparse.ArgumentTypeError(f"{warm_up} warm up, so it takes more than {found}")
        return found

    return count


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=more_than(WARM_UP), default=12)
    parser.add_argument("--shape", choices=SHAPES, default="28M")
    parser.add_argument("--batch_size", type=int, default=sft_case.BATCH_SIZE)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--plugin", default="ddp")
    parser.add_argument(
        "--tokenizer_dir", help="default: SmolLM2, made by examples/demo/smollm2.py"
    )
    add_trl_flags(parser)
    parser.add_argument("--output", help="write the figures as JSON")
    return parser.parse_args()


def add_trl_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trl",
        type=Path,
        default=sft_case.ROOT / ".trl",
        help="the folder of TRL, filled when it is not there",
    )
    parser.add_argument("--trl_defaults", action="store_true")


def trl_folder(folder: Path, requirements: str = "requirements-trl.txt") -> Path:
    """``folder`` with the TRL of ``requirements`` and nothing else, filled unless it is there."""
    wanted = HERE / requirements
    stamp = folder / ".coati-stamp"
    hashed = hashlib.sha256(wanted.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == hashed:
        return folder
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    command = [*pip, "--upgrade", "--target", str(folder), "-r", str(wanted)]
    if subprocess.run(command).returncode:
        sys.exit(f"bench_sft_peers.py: failed: {' '.join(command)}")
    stamp.write_text(hashed)
    return folder


def need_default_set() -> None:
    """End where TRL cannot run beside this environment's transformers."""
    from coati.utils.transformers_compat import transformers_major

    if transformers_major() < 5:
        sys.exit(
            f"bench-peers: TRL {trl_release()} needs a newer transformers than the pinned set's "
            f"{version('transformers')}; run it in the default set, without PINNED=1"
        )


def trl_release(requirements: str = "requirements-trl.txt") -> str:
    """The release that ``requirements`` names."""
    lines = (HERE / requirements).read_text(encoding="utf-8").splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith("trl=="))


def processor() -> str:
    """The name of this machine's processor, with the widest vectors that it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    found = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    flags = found.get("flags", "").split()
    widest = next((name for name in ("avx512f", "avx2") if name in flags), "")
    return f"{found.get('model name', 'unknown')} {widest.removesuffix('f').upper()}".strip()


def about() -> dict:
    """What was compared, and on what."""
    packages = {name: version(name) for name in ("torch", "transformers", "accelerate")}
    return {"trl": trl_release(), **packages, "processor": processor(), "cores": os.cpu_count()}


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


def run(args: argparse.Namespace, folder: Path) -> dict:
    """The steps of all systems in turn, and ours beside each other's."""
    words = ["--paced", "--folder", str(folder), "--steps", str(args.steps)]
    words += ["--batch_size", str(args.batch_size), "--plugin", args.plugin]
    ours = [sys.executable, str(HERE / "bench_sft.py"), *words]
    makers = {"coati": partial(Worker, "coati", ours)}
    of_trl = any(name.startswith("trl") for name in args.peers)
    site = trl_folder(args.trl) if of_trl else None
    for name in args.peers:
        given = [name, str(folder), str(args.steps), str(args.batch_size)]
        given += ["--defaults"] * args.trl_defaults
        command = [sys.executable, str(HERE / "sft_peers.py"), *given]
        makers[name] = partial(Worker, name, command, site=site)
    turns = take_turns(makers, args.steps)
    return {
        "about": about(),
        "shape": args.shape,
        "batch_size": args.batch_size,
        "trl_defaults": args.trl_defaults,
        **beside_ours(turns),
    }


def beside_ours(turns: Turns) -> dict:
    """The figures of each system, ours beside each other's, and who failed."""
    results = {name: figures(steps, turns.peaks[name]) for name, steps in turns.steps.items()}
    others = list(results)[1:]
    beside = {name: compared(results["coati"], results[name]) for name in others}
    return {**results, "beside": beside, "failed": turns.failed}


def compared(one: dict, other: dict) -> dict:
    """Of single steps after the warm-up: how many times as fast ``one`` is, the median with the
    quartiles; how its memory and losses differ."""
    pairs = zip(one["seconds"][WARM_UP:], other["seconds"][WARM_UP:], strict=True)
    ratios = [theirs / mine for mine, theirs in pairs]
    low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    losses = zip(one["losses"], other["losses"], strict=True)
    return {
        "ratio": median(ratios),
        "quartiles": [low, high],
        "steps": len(ratios),
        "memory_ratio": one["peak_memory_mb"] / other["peak_memory_mb"],
        "largest_relative_loss_difference": max(abs(a - b) / abs(b) for a, b in losses),
    }


def show(results: dict, beside: dict[str, dict]) -> None:
    """A line for each system."""
    for name in ("coati", *beside):
        row = results[name]
        line = (
            f"{name:17s} {row['tokens_per_second']:6.0f} tokens/s   peak "
            f"{row['peak_memory_mb']:5.0f} MiB   loss {row['losses'][0]:.4f} -> "
            f"{row['losses'][-1]:.4f}"
        )
        if name in beside:
            found = beside[name]
            low, high = found["quartiles"]
            line += (
                f"   {found['ratio']:.2f} x as fast (quartiles {low:.2f} to {high:.2f}) with "
                f"{found['memory_ratio']:.0%} of its memory; losses differ by at most "
                f"{found['largest_relative_loss_difference']:.1e} of their value"
            )
        print(line, flush=True)


def heading(about: dict) -> str:
    return (
        f"TRL {about['trl']}, transformers {about['transformers']}, torch {about['torch']}, "
        f"{about['cores']} cores of {about['processor']}"
    )


def end(failed: dict[str, str]) -> None:
    """Ends the script with an error where a peer failed."""
    if failed:
        sys.exit("failed: " + "; ".join(f"{name}: {why}" for name, why in failed.items()))


def main() -> None:
    args = parse()
    need_default_set()
    root = sft_case.CACHE if args.shape == "28M" else sft_case.CACHE / args.shape
    folder = sft_case.prepare(args.tokenizer_dir, root, SHAPES[args.shape])
    result = run(args, folder)
    print(
        f"SFT of a {args.shape} Llama, batch {args.batch_size}, {args.steps - WARM_UP} steps in "
        f"turn; {heading(result['about'])}"
    )
    show(result, result["beside"])
    if args.output:
        from coati.utils.json_io import save_json

        save_json(result, args.output)
    end(result["failed"])


if __name__ == "__main__":
    main()
