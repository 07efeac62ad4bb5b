"""What an episode of PPO spends its time on, how many samples a second it makes, and its memory
with one base.

Runs examples/training_scripts/train_ppo.py on the prompts of examples/data/prompt.jsonl with models
of random weights, each run in a process of its own. Four roles: policy, reference, critic, reward
model. Ways to hold them:

    copies    every role has its own weights; policy and critic are trained whole lora      policy
    and critic are trained by adapters; the reference is the policy without them: three copies one
    base  --shared_base: all four roles are adapters on one copy

The first episode, in which memory is touched for the first time, does not count. Peak memory is the
highest resident set of the process, interpreter and libraries included, which `libraries` is
without any model.

    python benchmarks/bench_ppo.py [--episodes 4] [--ways copies lora "one base"] [--shape 28M 135M]
    [--output F]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import sft_case  # noqa: E402

SHAPES = {
    "28M": sft_case.MODEL,
    "135M": sft_case.MODEL
    | {  # that of SmolLM2-135M
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
    },
}
LORA = ["--lora_rank", "8"]
WAYS = {"copies": [], "lora": LORA, "one base": [*LORA, "--shared_base"]}
PHASES = ("rollout", "scoring", "update")
PROMPTS = 8
NEW_TOKENS = 48
ROOT = sft_case.ROOT


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--episodes", type=int, default=4, help="the first is not counted")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--new_tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--output", help="write the figures as JSON")
    return parser.parse_args()


def prepare(shape: str) -> Path:
    """A folder with ``model/``, ``reward/`` and ``adapter/``, a reward model that is an adapter on
    ``model/``."""
    folder = sft_case.CACHE / f"ppo-{shape}"
    if (folder / "adapter").exists():
        return folder
    from benchmarks.preference_case import write_models
    from coati.models import LoraConfig, RewardModel, apply_lora, load_tokenizer, save_lora

    tokenizer = load_tokenizer(str(sft_case.prepare() / "model"))
    write_models(folder, SHAPES[shape])
    for role in ("model", "reward"):
        tokenizer.save_pretrained(folder / role)
    save_lora(
        apply_lora(RewardModel(str(folder / "model")), LoraConfig(r=int(LORA[1]))),
        folder / "adapter",
    )
    return folder


def command(way: str, folder: Path, save_dir: str, args: argparse.Namespace) -> list[str]:
    flags = {
        "pretrain": folder / "model",
        "rm_pretrain": folder / ("adapter" if "--shared_base" in WAYS[way] else "reward"),
        "conversation_template_config": ROOT
        / "config"
        / "conversation_template"
        / sft_case.TEMPLATE,
        "prompt_dataset": ROOT / "examples" / "data" / "prompt.jsonl",
        "save_dir": save_dir,
        "plugin": "ddp",
        "mixed_precision": "fp32",
        "num_episodes": args.episodes,
        "num_collect_steps": 1,
        "num_update_steps": 1,
        "experience_batch_size": PROMPTS,
        "train_batch_size": PROMPTS,
        "accumulation_steps": 1,
        "max_seq_len": args.new_tokens,
        "max_length": 256 + args.new_tokens,
        "sample_interval": 0,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [
        sys.executable,
        str(ROOT / "examples" / "training_scripts" / "train_ppo.py"),
        *words,
        *WAYS[way],
    ]


def run(way: str, folder: Path, args: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as save_dir:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            command(way, folder, save_dir, args), env=environment, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(
                f"bench_ppo.py: {way} ended with code {done.returncode}\n{done.stderr[-2000:]}"
            )
        lines = (Path(save_dir) / "metrics.jsonl").read_text().splitlines()
    return figures([json.loads(line) for line in lines])


def figures(logged: list[dict]) -> dict:
    """Of the lines of a run's metrics.jsonl."""
    episodes = [line for line in logged if "train/seconds_rollout" in line][1:]
    seconds = {phase: sum(line[f"train/seconds_{phase}"] for line in episodes) for phase in PHASES}
    whole = sum(seconds.values())
    return {
        "shares": {phase: spent / whole for phase, spent in seconds.items()},
        "seconds_per_episode": whole / len(episodes),
        "samples_per_second": PROMPTS * len(episodes) / whole,
        "rollout_tokens_per_second": sum(line["train/tokens_per_second"] for line in episodes)
        / len(episodes),
        "peak_memory_mb": next(
            line["memory/rank_0_peak_mb"] for line in logged if "memory/rank_0_peak_mb" in line
        ),
    }


def libraries() -> float:
    """Peak resident memory, MiB, of a process that has imported what a run imports."""
    code = (
        "import coati.trainer, coati.parallel.boost as b; b.prepare_colossalai(); "
        "from coati.utils.memory import peak_memory_mb as p; print(p())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    return float(run.stdout.splitlines()[-1])


def main() -> None:
    args = parse()
    import torch

    results: dict = {"libraries_mb": libraries(), "threads": torch.get_num_threads(), "shapes": {}}
    print(f"libraries alone: {results['libraries_mb']:.0f} MiB")
    for shape in args.shape:
        print(
            f"PPO of four {shape} models, {PROMPTS} prompts an episode, {args.new_tokens} new "
            "tokens"
        )
        results["shapes"][shape] = found = {}
        for way in args.ways:
            found[way] = row = run(way, prepare(shape), args)
            shares = ", ".join(f"{phase} {share:.0%}" for phase, share in row["shares"].items())
            print(
                f"  {way:8s} {row['samples_per_second']:5.2f} samples/s ({shares}), rollout "
                f"{row['rollout_tokens_per_second']:.0f} tokens/s, peak "
                f"{row['peak_memory_mb']:.0f} MiB",
                flush=True,
            )
    results["load_average"] = os.getloadavg()[0]
    if args.output:
        from coati.utils.json_io import save_json

        save_json(results, args.output)


if __name__ == "__main__":
    main()
