"""Samples per second of PPO on one NVIDIA GPU, beside the figures that ColossalChat published.

Random weights of the shapes of OPT, so no hub is needed; prompts of random tokens of one length,
bf16, a reference that is a copy of the policy and a reward model of the critic's shape. A sample is
a prompt with its answer, sampled, scored and trained on once; the first episode does not count.

    125m   OPT-125m policy, OPT-350m critic, 384 + 128 tokens, batches of 32: published 118.42
    samples/s of 8 processes 1.3b   OPT-1.3B policy, OPT-350m critic, 256 + 256 tokens: published
    3.13 samples/s of one A100 80 GB

    python benchmarks/bench_ppo_gpu.py [--case 125m 1.3b] [--episodes 4] [--batch_size 32] [--output
    results.json]
    python benchmarks/bench_ppo_gpu.py --tiny      # on a CPU in seconds: shows that the script
    runs, measures nothing
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

OPT = {
    "vocab_size": 50272,
    "max_position_embeddings": 2048,
    "dropout": 0.0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
SHAPES = {
    "125m": OPT
    | {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "ffn_dim": 3072,
        "word_embed_proj_dim": 768,
    },
    "350m": OPT
    | {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "ffn_dim": 4096,
        "word_embed_proj_dim": 512,
        "do_layer_norm_before": False,
    },
    "1.3b": OPT
    | {
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "ffn_dim": 8192,
        "word_embed_proj_dim": 2048,
    },
}
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 128,
    "word_embed_proj_dim": 64,
    "vocab_size": 384,
}
CRITIC = "350m"
PHASES = ("rollout", "scoring", "update")


@dataclass(frozen=True)
class Case:
    """``published``: samples/s of ``processes`` together."""

    prompt: int
    new: int
    published: float
    processes: int
    device: str


CASES = {
    "125m": Case(384, 128, 118.42, 8, "8 GPUs"),
    "1.3b": Case(256, 256, 3.13, 1, "one A100 80 GB"),
}
TINY = Case(12, 4, 1.0, 1, "")


class Ids:
    """In the place of a tokenizer: the text of a token is its number."""

    pad_token_id = 1
    eos_token_id = 2
    padding_side = "left"

    @staticmethod
    def decode(ids: list[int], skip_special_tokens: bool = False, **_: bool) -> str:
        return " ".join(map(str, ids))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--episodes", type=int, default=4, help="the first is not counted")
    parser.add_argument(
        "--batch_size",
        type=int,
        default=32,
        help="prompts of an episode, all in one optimizer step",
    )
    parser.add_argument("--plugin", default="zero2")
    parser.add_argument(
        "--tiny", action="store_true", help="models of nothing, on a CPU too: a test of this script"
    )
    parser.add_argument("--output", help="write the figures as JSON")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def models(args: argparse.Namespace, policy: str, options: Any):
    """All four, made on the GPU in bf16."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, OPTConfig

    from benchmarks.online_ways import boosted
    from coati.models import Critic, RewardModel

    def config(name: str) -> OPTConfig:
        return OPTConfig(**SHAPES[name] | (SMALL if args.tiny else {}))

    keywords = {"torch_dtype": torch.bfloat16, "attn_implementation": "sdpa"}
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.manual_seed(0)
        actor, reference = (
            AutoModelForCausalLM.from_config(config(policy), **keywords) for _ in range(2)
        )
        reference.load_state_dict(actor.state_dict())
        critic, reward = (
            kind(backbone=AutoModel.from_config(config(CRITIC), **keywords))
            for kind in (Critic, RewardModel)
        )
    return boosted(options, actor, critic, reward, reference)


def train(args: argparse.Namespace) -> dict[str, Any]:
    """In a worker: the episodes of one case."""
    import torch

    from benchmarks.online_case import Size
    from benchmarks.online_ways import Paced, loader, make_trainer
    from coati.parallel.launch import launch
    from coati.parallel.plugins import ParallelOptions
    from coati.utils.memory import peak_memory_mb

    launch()
    name = args.case[0]
    case = TINY if args.tiny else CASES[name]
    size = Size(prompts=args.batch_size, new=case.new)
    options = ParallelOptions(plugin=args.plugin, precision="bf16", grad_clip=1.0)
    vocabulary = (SHAPES[name] | (SMALL if args.tiny else {}))["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(
        3, vocabulary, (size.prompts, case.prompt), generator=generator
    ).tolist()
    episodes: list[dict] = []
    rows = Paced(loader(prompts, Ids), tell=episodes.append)
    make_trainer(models(args, name, options), size, args.episodes, rows, Ids).run(rows)
    return {"peak_memory_mb": peak_memory_mb(), "episodes": episodes}


def measure(args: argparse.Namespace, name: str) -> dict[str, Any]:
    words = ["--worker", "--case", name, "--plugin", args.plugin, "--episodes", str(args.episodes)]
    words += ["--batch_size", str(args.batch_size), *["--tiny"] * args.tiny]
    run = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True)
    if run.returncode:
        sys.exit(f"bench_ppo_gpu.py: case {name} ended with code {run.returncode}")
    found = json.loads(run.stdout.splitlines()[-1])
    found["samples_per_second"] = args.batch_size / median(
        one["seconds"] for one in found["episodes"][1:]
    )
    return found


def show(args: argparse.Namespace, name: str, found: dict[str, Any]) -> None:
    case = CASES[name]
    counted = found["episodes"][1:]
    whole = sum(one["seconds"] for one in counted)
    shares = ", ".join(f"{part} {sum(one[part] for one in counted) / whole:.0%}" for part in PHASES)
    speed = found["samples_per_second"]
    peak = found["peak_memory_mb"]
    line = f"{name}: {speed:.2f} samples/s ({shares}), peak {peak:.0f} MB"
    if args.tiny:
        line += " (tiny models: these figures mean nothing)"
    else:
        each = case.published / case.processes
        line += f"; published {case.published} on {case.device}, {each:.2f} a process: "
        line += f"{speed / each:.1f} x that"
    print(line, flush=True)


def main() -> None:
    args = parse()
    if args.worker:
        print(json.dumps(train(args)))
        return
    import torch

    if not (torch.cuda.is_available() or args.tiny):
        sys.exit(
            "bench_ppo_gpu.py: needs an NVIDIA GPU; --tiny shows on a CPU that the script runs"
        )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    results: dict[str, Any] = {
        "device": device,
        "torch": torch.__version__,
        "tiny": args.tiny,
        "plugin": args.plugin,
    }
    print(
        f"PPO on {'tiny models' if args.tiny else 'OPT'}, plugin {args.plugin}, one device "
        f"({device})"
    )
    for name in args.case:
        results[name] = found = measure(args, name)
        show(args, name, found)
    if args.output:
        from coati.utils.json_io import save_json

        save_json(results, args.output)


if __name__ == "__main__":
    main()
