"""Peak GPU memory of DPO on a 7B model, one NVIDIA GPU, beside the figures that ColossalChat
published for one H800.

Random weights of the shape of Llama-2-7B, so no hub is needed; plugin zero2_cpu in bf16, gradient
checkpointing; rows of 2048 tokens, the second half of them the answer; a frozen copy as the live
reference. Each batch size has a process of its own. The optimizer stands in host memory: about 130
GB of it are needed, and about 50 GB on the GPU.

    python benchmarks/bench_dpo_7b.py [--batch_size 2 4] [--steps 3] [--no_grad_checkpoint]
    [--output results.json]
    python benchmarks/bench_dpo_7b.py --tiny      # on a CPU in seconds: shows that the script runs,
    measures nothing
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PUBLISHED_MB = {2: 49873.90, 4: 60998.22}  # by batch size, on one H800
SHAPE = {  # 6.74 billion parameters
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
TINY = SHAPE | {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 384,
}
TOKENS = 2048
TINY_TOKENS = 64


class Rows(list):
    """Pairs as the library's loader sees a data set."""

    @property
    def column_names(self) -> list[str]:
        return list(self[0])

    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


class Pad:
    pad_token_id = 2
    eos_token_id = 2
    padding_side = "right"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--batch_size", type=int, nargs="+", default=list(PUBLISHED_MB), help="pairs of a step"
    )
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--plugin", default="zero2_cpu")
    parser.add_argument("--no_grad_checkpoint", action="store_true", help="keep every activation")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="a model of nothing, on a CPU too: a test of this script",
    )
    parser.add_argument("--output", help="write the figures as JSON")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def pairs(count: int, tokens: int, vocabulary: int) -> Rows:
    import torch

    generator = torch.Generator().manual_seed(0)
    half = tokens // 2
    mask = [False] * half + [True] * (tokens - half)
    prompts, *answers = (
        torch.randint(3, vocabulary, (count, half), generator=generator).tolist() for _ in range(3)
    )
    return Rows(
        {
            "chosen_input_ids": p + c,
            "rejected_input_ids": p + r,
            "chosen_loss_mask": mask,
            "rejected_loss_mask": mask,
            "seq_length": tokens,
        }
        for p, c, r in zip(prompts, *answers, strict=True)
    )


def model_of(shape: dict[str, Any]):
    """Random weights, made on the GPU in bf16; the host never holds them in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**shape, pad_token_id=2)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(
            config, torch_dtype=torch.bfloat16, attn_implementation="sdpa"
        )


def train(args: argparse.Namespace) -> dict[str, Any]:
    """In a worker: steps of one batch size."""
    from coati.dataset import DataCollatorForPreferenceDataset
    from coati.dataset.load.loader import GlobalBatchLoader
    from coati.models.loading import disable_dropout
    from coati.parallel.boost import boost
    from coati.parallel.inference_model import InferenceModel, boost_for_inference
    from coati.parallel.launch import launch
    from coati.parallel.plugins import ParallelOptions
    from coati.trainer import DPOTrainer
    from coati.utils.memory import peak_memory_mb

    launch()
    shape, tokens = (TINY, TINY_TOKENS) if args.tiny else (SHAPE, TOKENS)
    options = ParallelOptions(
        plugin=args.plugin, precision="bf16", grad_checkpoint=not args.no_grad_checkpoint
    )
    reference = model_of(shape)
    disable_dropout(reference)
    reference = InferenceModel(boost_for_inference(reference, options))
    engine = boost(model_of(shape), options, total_steps=args.steps, warmup_steps=0)
    trainer = DPOTrainer(engine=engine, reference=reference, starts_at_reference=True)
    batch = args.batch_size[0]
    loader = GlobalBatchLoader(
        pairs(batch * args.steps, tokens, shape["vocab_size"]),
        DataCollatorForPreferenceDataset(Pad, tokens),
        batch_size=batch,
        shuffle=False,
    )
    steps = []
    for window in loader.global_batches(0):
        started = time.perf_counter()
        step = engine.train_step(window, trainer.objective)
        steps.append(
            {"seconds": time.perf_counter() - started, "loss": step.loss, "tokens": step.tokens}
        )
    return {"peak_memory_mb": peak_memory_mb(), "steps": steps}


def measure(args: argparse.Namespace, batch: int) -> dict[str, Any]:
    words = [
        "--worker",
        "--batch_size",
        str(batch),
        "--steps",
        str(args.steps),
        "--plugin",
        args.plugin,
    ]
    words += ["--tiny"] * args.tiny + ["--no_grad_checkpoint"] * args.no_grad_checkpoint
    run = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True)
    if run.returncode:
        sys.exit(f"bench_dpo_7b.py: batch size {batch} ended with code {run.returncode}")
    return json.loads(run.stdout.splitlines()[-1])


def show(args: argparse.Namespace, batch: int, found: dict[str, Any]) -> None:
    last = found["steps"][-1]
    line = (
        f"batch size {batch}: peak {found['peak_memory_mb']:.2f} MB, "
        f"{last['tokens'] / last['seconds']:.0f} tokens/s, first loss "
        f"{found['steps'][0]['loss']:.4f}"
    )
    if args.tiny:
        line += " (a tiny model: these figures mean nothing)"
    elif batch in PUBLISHED_MB:
        published = PUBLISHED_MB[batch]
        share = found["peak_memory_mb"] / published
        line += f"; published {published:.2f} MB: {share:.0%} of it"
    print(line, flush=True)


def main() -> None:
    args = parse()
    if args.worker:
        print(json.dumps(train(args)))
        return
    import torch

    if not (torch.cuda.is_available() or args.tiny):
        sys.exit(
            "bench_dpo_7b.py: needs an NVIDIA GPU with 80 GB; --tiny shows on a CPU that the "
            "script runs"
        )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    results: dict[str, Any] = {
        "device": device,
        "torch": torch.__version__,
        "tiny": args.tiny,
        "plugin": args.plugin,
    }
    print(
        f"DPO on {'a tiny model' if args.tiny else '7B'}, plugin {args.plugin}, one device "
        f"({device})"
    )
    for batch in args.batch_size:
        results[str(batch)] = found = measure(args, batch)
        show(args, batch, found)
    if args.output:
        from coati.utils.json_io import save_json

        save_json(results, args.output)


if __name__ == "__main__":
    main()
