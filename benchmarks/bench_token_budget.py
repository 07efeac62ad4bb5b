"""What --tokens_per_batch brings on ragged rows: seconds of an optimizer step and of scoring,
cut by rows and by tokens, a step of each in turn.

A 28M Llama with random weights in fp32 on one process; rows of log-normal lengths (median 90
tokens, at most 512), the last two thirds of each supervised. By rows: micro-batches of 4 in the
order in which they were drawn. By tokens: micro-batches of as many tokens as the widest of those
takes, so that neither needs more memory. "padded": what a model gets that needs padding;
"without": rows laid end to end. "kernels": the same step by transformers' own layers and by the
library's fused ones.

    python benchmarks/bench_token_budget.py [--rounds 10] [--rows 32] [--output results.json]
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import sft_case  # noqa: E402

SIZE = 4  # rows of a micro-batch
WARM_UP = 1


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10, help="steps of each way that count")
    parser.add_argument("--rows", type=int, default=32, help="of a step")
    parser.add_argument("--tiny", action="store_true", help="a model of a minute, to try it out")
    parser.add_argument("--output", help="write the figures as JSON")
    return parser.parse_args(argv)


def ragged(rows: int, tiny: bool) -> list[dict[str, Any]]:
    """Rows of a data set."""
    import torch

    generator = torch.Generator().manual_seed(0)
    middle = 12.0 if tiny else 90.0
    drawn = middle * torch.randn(rows, generator=generator).mul(0.8).exp()
    made = []
    for length in drawn.clamp(4, 64 if tiny else 512).int().tolist():
        ids = torch.randint(3, 300 if tiny else 49000, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return made


def make_engine(tiny: bool) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from coati.parallel.boost import boost
    from coati.parallel.launch import launch
    from coati.parallel.plugins import ParallelOptions

    launch()
    torch.manual_seed(0)
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "vocab_size": 320}
    model = LlamaForCausalLM(LlamaConfig(**(sft_case.MODEL | (small if tiny else {}))))
    options = ParallelOptions(plugin="ddp", precision="fp32")
    return boost(model, options, lr=1e-9, total_steps=10**6, warmup_steps=0)


def ways(engine: Any, rows: list[dict], collate: Any) -> Iterator[tuple[str, str, Callable]]:
    """(part, way, what takes a step of it); the second of a part is compared with the first."""
    from coati.models.fused_layers import original_layers
    from coati.trainer.sft import SFTObjective

    by_rows = [collate(rows[start : start + SIZE]) for start in range(0, len(rows), SIZE)]
    budget = max(batch["input_ids"].numel() for batch in by_rows)
    free = engine.padding_free
    options = engine.options
    objective = SFTObjective()

    def step(padded: bool, tokens: int | None, own_layers: bool = False) -> float:
        engine.padding_free = None if padded else free
        engine.options = replace(options, tokens_per_batch=tokens)
        with original_layers() if own_layers else nullcontext():
            return engine.train_step(by_rows, objective).loss

    def scored(padded: bool, tokens: int | None) -> float:
        engine.padding_free = None if padded else free
        engine.options = replace(options, tokens_per_batch=tokens)
        whole = collate(rows)
        batches = [whole] if tokens else by_rows
        return float(sum(engine.forward_only(b, _sums, rows_together=1).sum() for b in batches))

    for padded in (True, False):
        name = "padded" if padded else "without"
        yield f"step, {name}", "by rows", lambda p=padded: step(p, None)
        yield f"step, {name}", "by tokens", lambda p=padded: step(p, budget)
        yield f"scoring, {name}", "by rows", lambda p=padded: scored(p, None)
        yield f"scoring, {name}", "by tokens", lambda p=padded: scored(p, budget)
    yield "kernels", "transformers' layers", lambda: step(False, budget, own_layers=True)
    yield "kernels", "fused", lambda: step(False, budget)


def _sums(logps: Any, batch: dict) -> Any:
    import torch

    labels = batch["labels"][:, 1:] != -100
    return torch.zeros(labels.shape).masked_scatter(labels, logps.float()).sum(1)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    from coati.dataset import DataCollatorForSupervisedDataset

    class Padding:
        pad_token_id = 2
        eos_token_id = 2
        padding_side = "right"

    engine = make_engine(args.tiny)
    rows = ragged(args.rows, args.tiny)
    collate = DataCollatorForSupervisedDataset(Padding(), 512)
    seconds: dict[str, dict[str, list[float]]] = {}
    results: dict[str, dict[str, float]] = {}
    taken = list(ways(engine, rows, collate))
    for number in range(WARM_UP + args.rounds):
        for part, way, take in taken:
            started = time.perf_counter()
            result = take()
            if number == 0:
                results.setdefault(part, {})[way] = result
            if number >= WARM_UP:
                seconds.setdefault(part, {}).setdefault(way, []).append(
                    time.perf_counter() - started
                )
    tokens = sum(len(row["input_ids"]) for row in rows)
    parts = {}
    for part, by_way in seconds.items():
        (first, before), (second, after) = by_way.items()
        ratios = sorted(a / b for a, b in zip(before, after, strict=True))
        parts[part] = {
            f"{first} s": median(before),
            f"{second} s": median(after),
            "ratio": median(ratios),
            "quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
            "results": [results[part][first], results[part][second]],
        }
    return {"rows": args.rows, "tokens": tokens, "parts": parts}


def main() -> None:
    args = parse()
    from benchmarks.data_case import machine_with_torch
    from coati.utils.json_io import save_json

    about = machine_with_torch()
    figures = measure(args)
    for part, found in figures["parts"].items():
        first, second = ((name, found[name]) for name in list(found)[:2])
        low, high = found["quartiles"]
        print(
            f"{part:18s} {first[0].removesuffix(' s')} {first[1]:.3f} s, "
            f"{second[0].removesuffix(' s')} {second[1]:.3f} s: {found['ratio']:.3f} x "
            f"({low:.3f} to {high:.3f})"
        )
    if args.output:
        save_json({"machine": about, **figures}, args.output)


if __name__ == "__main__":
    main()
