"""SFT beside TRL 1.16.0: same model, rows, order, batches and learning rate, both on the
assistant's tokens only.

Each system runs in an environment and a process of its own, with all cores; they take their steps
in turn, so whatever else the machine does slows both. Tokens are real tokens: padding counts for
neither. TRL gets the settings that are fastest on a CPU (fp32, no gradient checkpointing);
--trl_defaults leaves it its own (bf16, checkpointing).

    python benchmarks/bench_sft_peers.py [--steps 20] [--trl_env DIR] [--trl_python PATH] [--output
    results.json]
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import sft_case  # noqa: E402

HERE = Path(__file__).resolve().parent
WARM_UP = 2  # steps before counting begins


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--plugin", default="ddp")
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


def trl_python(folder: Path, requirements: str = "requirements-trl.txt") -> str:
    """The Python of an environment with ``requirements``, built in ``folder`` unless it is
    there."""
    requirements, python, stamp = (
        HERE / requirements,
        folder / "bin" / "python",
        folder / ".coati-stamp",
    )
    wanted = hashlib.sha256(requirements.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return str(python)
    print(f"bench_sft_peers.py: building {folder} (minutes)", flush=True)
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", "--no-compile", "-r", str(requirements)],
    ):
        if subprocess.run(command).returncode:
            sys.exit(f"bench_sft_peers.py: failed: {' '.join(command)}")
    stamp.write_text(wanted)
    return str(python)


class Worker:
    """A training process that takes one step per line it is sent. ``cwd``: the checkout it runs."""

    def __init__(self, name: str, command: list[str], cwd: Path | None = None):
        self.name = name
        self.steps: list[dict] = []
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            cwd=cwd,
            env=os.environ | ({} if cwd is None else {"PYTHONPATH": str(cwd)}),
        )
        self._read(lambda line: line == "ready")

    def step(self) -> None:
        self.process.stdin.write("\n")
        self.steps.append(json.loads(self._read(lambda line: line.startswith('{"'))))

    def finish(self) -> float:
        """Peak resident memory, MiB."""
        peak = json.loads(self._read(lambda line: line.startswith('{"peak_mb')))["peak_mb"]
        self.process.stdin.close()
        self.process.wait(60)
        return peak

    def _read(self, wanted) -> str:
        for line in self.process.stdout:
            if wanted(line := line.strip()):
                return line
        sys.exit(f"bench_sft_peers.py: {self.name} ended with code {self.process.wait()}")


def figures(worker: Worker, peak: float) -> dict:
    counted = worker.steps[WARM_UP:]
    tokens = sum(step["tokens"] for step in counted)
    return {
        "tokens_per_second": tokens / sum(step["seconds"] for step in counted),
        "peak_memory_mb": peak,
        "supervised_share_of_tokens": sum(step["supervised"] for step in counted) / tokens,
        "seconds": [step["seconds"] for step in worker.steps],
        "losses": [step["loss"] for step in worker.steps],
    }


def run(folder: Path, steps: int, plugin: str, python: str, trl_defaults: bool) -> dict:
    ours = [
        sys.executable,
        str(HERE / "bench_sft.py"),
        "--paced",
        "--steps",
        str(steps),
        "--plugin",
        plugin,
    ]
    theirs = [
        python,
        str(HERE / "trl_worker.py"),
        str(folder),
        str(steps),
        *["--defaults"] * trl_defaults,
    ]
    workers = [Worker("coati", ours), Worker("trl", theirs)]
    for index in range(steps):
        for worker in workers if index % 2 else reversed(workers):
            worker.step()
    results = {worker.name: figures(worker, worker.finish()) for worker in workers}
    one = results["coati"]
    other = results["trl"]
    differences = [abs(a - b) / b for a, b in zip(one["losses"], other["losses"], strict=True)]
    return results | {
        "tokens_per_second_ratio": one["tokens_per_second"] / other["tokens_per_second"],
        "memory_ratio": one["peak_memory_mb"] / other["peak_memory_mb"],
        "largest_relative_loss_difference": max(differences),
        "trl_defaults": trl_defaults,
    }


def main() -> None:
    args = parse()
    python = args.trl_python or trl_python(args.trl_env)
    folder = sft_case.prepare(args.tokenizer_dir)
    result = run(folder, args.steps, args.plugin, python, args.trl_defaults)
    settings = "with its own defaults" if args.trl_defaults else "in fp32 without checkpointing"
    counted = args.steps - WARM_UP
    print(
        f"SFT of a 28M Llama, batch {sft_case.BATCH_SIZE}, {counted} steps in turn; TRL 1.16.0 "
        f"{settings}"
    )
    for name in ("coati", "trl"):
        row = result[name]
        print(
            f"{name:6s} {row['tokens_per_second']:6.0f} tokens/s   peak "
            f"{row['peak_memory_mb']:5.0f} MiB   {row['supervised_share_of_tokens']:.0%} of the "
            f"tokens supervised   loss {row['losses'][0]:.4f} -> {row['losses'][-1]:.4f}"
        )
    print(
        f"{result['tokens_per_second_ratio']:.1f} x TRL's tokens/s with "
        f"{result['memory_ratio']:.0%} of its memory; losses differ by at most "
        f"{result['largest_relative_loss_difference']:.1e} of their value"
    )
    if args.output:
        from coati.utils.json_io import save_json

        save_json(result, args.output)


if __name__ == "__main__":
    main()
