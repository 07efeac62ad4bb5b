"""The share of a model's weights that one process of --tp 2 holds, experts included.

    python benchmarks/bench_tp_memory.py [--families qwen3,gpt_oss]

Tiny models of docs/models.md with wide layers, split over two processes; bytes of the parameters of
the process that holds most, over those of one process with the whole model.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.distributed.spawn import run  # noqa: E402
from tests.models_table.families import BY_TYPE, known, tiny_model  # noqa: E402

FAMILIES = (
    "llama,qwen2,qwen3,gemma3_text,gpt_oss,mixtral,qwen3_moe,deepseek_v3,glm4_moe,olmo3,phi3,gpt2"
)


def held(names: list[str]) -> list[tuple[int, int]]:
    """In a worker: bytes of each model's weights, whole and on this process."""
    from coati.parallel.boost import boost
    from coati.parallel.launch import launch
    from coati.parallel.options import ParallelOptions

    launch(seed=0, timeout_s=60)
    found = []
    for name in names:
        model = tiny_model(BY_TYPE[name])
        whole = _bytes(model)
        engine = boost(model, ParallelOptions(plugin="3d", tp=2, batch_size=2), total_steps=1)
        found.append((whole, _bytes(engine.module)))
    return found


def _bytes(model) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", default=FAMILIES)
    args = parser.parse_args()
    names = [name for name in args.families.split(",") if known(BY_TYPE[name])]
    ranks = run(2, "benchmarks.bench_tp_memory:held", names)
    for name, *pairs in zip(names, *ranks, strict=True):
        whole = pairs[0][0]
        print(f"{name:18} {max(mine for _, mine in pairs) / whole:6.1%} of {whole:,} bytes")


if __name__ == "__main__":
    main()
