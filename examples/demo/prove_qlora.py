"""Proof that adapters on a base of few bits learn what they learn on the whole one: SmolLM2-135M is
fine-tuned with LoRA, and with LoRA on a base quantized to nf4 and to int8, on the same rows.

``python examples/demo/prove_qlora.py [--steps N] [--work DIR]`` prints the loss on held-out rows
before and after, and the peak memory. Exit code 1 where a loss is more than 2% above LoRA's.
``make prove-qlora`` calls it with its environment; on one idle core it takes three quarters of an
hour.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROWS = ROOT / "examples" / "data" / "sft.jsonl"
TEMPLATE = ROOT / "config/conversation_template/HuggingFaceTB_SmolLM2-135M-Instruct.json"
MOST = 0.02  # by which a loss may be above LoRA's
RUNS = {
    "LoRA": (),
    "LoRA on nf4": ("--quantize_base", "nf4"),
    "LoRA on int8": ("--quantize_base", "int8"),
}


def train(model: str, folder: Path, steps: int, flags: tuple[str, ...]) -> tuple[float, float, str]:
    """Losses on held-out rows before and after ``steps``, and the peak memory in words."""
    words = ["--pretrain", model, "--dataset", ROWS, "--eval_ratio", "0.1", "--eval_interval", "0"]
    words += ["--conversation_template_config", TEMPLATE, "--max_length", "96"]
    words += ["--batch_size", "4", "--accumulation_steps", "1", "--max_steps", steps]
    words += ["--lora_rank", "32", "--lr", "1e-3", "--plugin", "ddp", "--mixed_precision", "fp32"]
    words += ["--save_interval", "0", "--save_dir", folder, *flags]
    call = [sys.executable, "-m", "coati", "sft", *map(str, words)]
    run = subprocess.run(call, capture_output=True, text=True, env=os.environ, cwd=ROOT)
    if run.returncode:
        sys.exit(run.stderr)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [row["eval/loss"] for row in map(json.loads, lines) if "eval/loss" in row]
    memory = re.search(r"peak memory \d+ MiB", run.stderr)
    return losses[0], losses[-1], memory[0] if memory else ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of 4 rows")
    parser.add_argument("--work", type=Path, default=ROOT / "output" / "prove-qlora")
    args = parser.parse_args()
    call = [sys.executable, str(ROOT / "examples" / "demo" / "smollm2.py")]
    model = subprocess.run(call, capture_output=True, text=True, check=True).stdout.split()[-1]
    reached: dict[str, float] = {}
    for name, flags in RUNS.items():
        folder = args.work / name.replace(" ", "-")
        before, reached[name], memory = train(model, folder, args.steps, flags)
        beside = reached[name] / reached["LoRA"] - 1
        print(
            f"{name}: {before:.4f} before, {reached[name]:.4f} after {args.steps} steps "
            f"({beside:+.2%} beside LoRA), {memory}",
            flush=True,
        )
    if max(reached.values()) > (1 + MOST) * reached["LoRA"]:
        sys.exit(f"a loss is more than {MOST:.0%} above LoRA's")


if __name__ == "__main__":
    main()
