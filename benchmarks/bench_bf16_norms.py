"""How far bf16 takes the gradient norm of each family from fp32's, in plain PyTorch and here.

    python benchmarks/bench_bf16_norms.py [--families qwen3_next,gemma4_text]

One batch through the tiny models of docs/models.md. "plain": transformers' model in bf16 and
PyTorch's autograd, without this library or ColossalAI. "zero2": the library's step in bf16. The
columns are relative differences from plain fp32; where plain bf16 is as far off as the library, it
is the number format and the family's recurrences and routers, not the library.
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.models_table.cells import Column, _CrossEntropy, boosted, rows  # noqa: E402
from tests.models_table.families import BY_TYPE, known, tiny_model  # noqa: E402

FAMILIES = "llama,qwen3,qwen3_next,qwen3_5_text,qwen3_5_moe_text,gemma3_text,gemma4_text,gpt_oss"


def plain_norm(name: str, dtype: torch.dtype) -> float:
    """The gradient norm of the mean cross-entropy over the batch's labels."""
    model = tiny_model(BY_TYPE[name]).to(dtype)
    batch = rows(0, model.config.pad_token_id or 0)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), batch["labels"][:, 1:].flatten()
    )
    loss.backward()
    squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
    return torch.stack(squares).sum().sqrt().item()


def library_norm(name: str) -> float:
    """The norm that the library's step in bf16 reports."""
    engine = boosted(BY_TYPE[name], Column("", {"plugin": "zero2", "precision": "bf16"}))
    return engine.train_step([rows(0, 0)], _CrossEntropy()).grad_norm


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", default=FAMILIES)
    args = parser.parse_args()
    from coati.parallel.launch import launch

    launch(seed=0)
    print(f"{'family':20} {'fp32 norm':>10} {'plain bf16':>11} {'zero2 bf16':>11}")
    for name in args.families.split(","):
        if not known(BY_TYPE[name]):
            continue
        exact = plain_norm(name, torch.float32)
        found = [plain_norm(name, torch.bfloat16), library_norm(name)]
        off = [f"{100 * (norm / exact - 1):+10.2f}%" for norm in found]
        print(f"{name:20} {exact:10.4f} {off[0]:>11} {off[1]:>11}", flush=True)


if __name__ == "__main__":
    main()
