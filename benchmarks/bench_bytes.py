"""Bytes that a process sends in an optimizer step of ddp, zero2 and zero2 with LoRA over gloo,
beside the least that the method needs.

A 4M-parameter Llama on random rows. As root it starts two processes on a loopback interface of
their own (a network namespace), where nothing else sends; between hosts start it as any script with
several processes, one on each host, and it counts what leaves through --interface. With P bytes of
gradients and n processes the least is 2 (n - 1) / n P: ddp all-reduces the gradients, zero2
scatters their sums and gathers the updated weights.

    python benchmarks/bench_bytes.py [--nproc 2] [--interface eth0] [--output results.json]
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

STEPS = 4
PORT = 29577  # in a namespace where every port is free
CASES = {
    "ddp": ("ddp", "fp32", 0),
    "zero2": ("zero2", "fp32", 0),
    "zero2 bf16": ("zero2", "bf16", 0),
    "zero2 + LoRA": ("zero2", "fp32", 256),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--interface", default="lo", help="where one process of each host sends")
    parser.add_argument("--output", help="write the figures as JSON")
    return parser.parse_args()


def start(args: argparse.Namespace) -> int:
    """Run this program ``nproc`` times in a network of its own."""
    if os.geteuid():
        raise SystemExit("a network of its own needs root; or start it with a launcher")
    words = [sys.executable, *sys.argv]
    variables = {"WORLD_SIZE": str(args.nproc), "MASTER_ADDR": "127.0.0.1"}
    variables |= {"MASTER_PORT": str(PORT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    alone = ["unshare", "--net", "bash", "-c", 'ip link set lo up && exec "$@"', "-"]
    ranks = " & ".join(f'RANK={rank} LOCAL_RANK={rank} "$@"' for rank in range(1, args.nproc))
    together = ["bash", "-c", f'{ranks} & RANK=0 LOCAL_RANK=0 "$@"', "-"]
    return subprocess.run([*alone, *together, *words], env={**os.environ, **variables}).returncode


def measure(interface: str) -> dict[str, dict[str, float]]:
    """Of each case the bytes that a process sends in a step, and the least."""
    import torch.distributed as dist

    from coati.parallel.launch import launch, shut_down

    launch()
    found = {}
    for name, (plugin, precision, lora_rank) in CASES.items():
        step, parameter_bytes = training_step(plugin, precision, lora_rank)
        step()  # buckets and groups are made
        ways = dist.get_world_size()
        dist.barrier()
        before = sent(interface)
        for _ in range(STEPS):
            step()
        dist.barrier()
        # Every process sends through the loopback interface, one through that of a host.
        senders = ways if interface == "lo" else 1
        each = (sent(interface) - before) / STEPS / senders
        least = 2 * (ways - 1) / ways * parameter_bytes
        found[name] = {"sent": each, "least": least, "ratio": round(each / least, 4)}
    shut_down(wait=True)
    return found


def training_step(plugin: str, precision: str, lora_rank: int):
    """A function that takes one optimizer step, and the bytes of the gradients."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from coati.models.lora.lora import LoraConfig, apply_lora
    from coati.parallel.boost import boost
    from coati.parallel.options import ParallelOptions
    from coati.trainer.sft import SFTObjective

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "vocab_size": 1024}
    model = LlamaForCausalLM(
        LlamaConfig(**sizes, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4)
    )
    if lora_rank:
        model = apply_lora(model, LoraConfig(r=lora_rank))
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    options = ParallelOptions(plugin=plugin, precision=precision, lora=bool(lora_rank))
    engine = boost(model, options, lr=1e-4)
    ids = torch.arange(2 * 16).view(2, 16) % sizes["vocab_size"]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids).bool(), "labels": ids}
    width = 2 if precision == "bf16" else 4
    return lambda: engine.train_step([batch], SFTObjective()), count * width


def sent(interface: str) -> int:
    """Bytes that have left through ``interface``."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, figures = line.partition(":")
        if name.strip() == interface:
            return int(figures.split()[8])
    raise SystemExit(f"no network interface {interface}")


def main() -> None:
    args = parse()
    if "RANK" not in os.environ:
        sys.exit(start(args))
    found = measure(args.interface)
    if os.environ["RANK"] != "0":
        return
    for name, row in found.items():
        print(f"{name:14}{row['sent']:14,.0f} bytes{row['ratio']:8.3f} of the least")
    if args.output:
        Path(args.output).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
