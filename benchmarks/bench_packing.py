"""What --packing brings: tokens/s of the same rows padded, laid end to end, and packed, a step of
each in turn.

The model and rows of bench_sft.py on one process. A step has as many tokens either way: 8 rows or
so, or as many packs as hold them. Ways of giving rows to the model:

    padded        batches of rows of like length, padded to the longest: what a GPU gets without
    --packing
    end to end    the same batches without their padding: what a CPU gets without --packing packed
    packs of up to --max_length tokens, laid end to end: a CPU with --packing (a GPU with
    flash-attention) packed, mask  the same packs under a block-diagonal mask: plugins and GPUs that
    cannot be given the ends of rows

    python benchmarks/bench_packing.py [--rounds 12] [--max_length 512] [--tokenizer_dir MODEL]
    [--output results.json]
"""

import argparse
import os
import sys
import time
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import sft_case  # noqa: E402

WAYS = ("padded", "end to end", "packed", "packed, mask")
WARM_UP = 2


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=12, help="steps of each way that count")
    parser.add_argument("--max_length", type=int, default=512, help="tokens of a pack")
    parser.add_argument(
        "--tokenizer_dir", help="default: SmolLM2, made by examples/demo/smollm2.py"
    )
    parser.add_argument("--output", help="write the figures as JSON")
    return parser.parse_args()


def loaders(rows, tokenizer, max_length: int) -> tuple[Any, Any]:
    """Windows of 8 rows, and of about as many tokens in packs."""
    from coati.dataset import DataCollatorForSupervisedDataset
    from coati.dataset.load.epoch_order import EpochOrder
    from coati.dataset.load.loader import GlobalBatchLoader, row_lengths
    from coati.dataset.load.packing import PackCollator

    collate = DataCollatorForSupervisedDataset(tokenizer, max_length)
    plan = EpochOrder(row_lengths(rows), pack_length=max_length)
    tokens_of_a_batch = float(plan.lengths.mean()) * sft_case.BATCH_SIZE
    size = max(1, round(tokens_of_a_batch / max_length))
    packed = GlobalBatchLoader(rows, PackCollator(collate), batch_size=size, epoch_order=plan)
    return GlobalBatchLoader(rows, collate, batch_size=sft_case.BATCH_SIZE), packed


def make_engine(folder: Path):
    from coati.models import load_causal_lm
    from coati.parallel.boost import boost
    from coati.parallel.launch import launch
    from coati.parallel.plugins import ParallelOptions

    launch()
    model = load_causal_lm(str(folder / "model"), dtype="fp32")
    options = ParallelOptions(
        plugin="ddp", precision="fp32", grad_clip=sft_case.MAX_NORM, packing=True
    )
    return boost(model, options, lr=sft_case.LEARNING_RATE, total_steps=10**6, warmup_steps=0)


def windows(loader):
    """Endlessly, epoch after epoch."""
    for epoch in cycle(range(1000)):
        yield from loader.global_batches(epoch)


def measure(engine, by_rows, by_packs, rounds: int) -> dict[str, list[tuple[int, float]]]:
    """(tokens, seconds) of each step of each way."""
    from coati.trainer.sft import SFTObjective

    objective = SFTObjective()
    end_to_end = engine.padding_free
    sources = {way: windows(by_packs if way.startswith("packed") else by_rows) for way in WAYS}
    found: dict[str, list[tuple[int, float]]] = {way: [] for way in WAYS}
    for _ in range(WARM_UP + rounds):
        for way, source in sources.items():
            engine.padding_free = end_to_end if way in ("end to end", "packed") else None
            window = next(source)
            started = time.perf_counter()
            step = engine.train_step(window, objective)
            found[way].append((step.tokens, time.perf_counter() - started))
    return {way: steps[WARM_UP:] for way, steps in found.items()}


def summary(found: dict[str, list[tuple[int, float]]]) -> dict[str, Any]:
    """Tokens/s of each way over its steps, and the median over the rounds of its rate divided by
    that of "padded"."""
    figures: dict[str, Any] = {}
    padded = [tokens / seconds for tokens, seconds in found["padded"]]
    for way, steps in found.items():
        rates = [tokens / seconds for tokens, seconds in steps]
        figures[way] = {
            "tokens_per_second": sum(tokens for tokens, _ in steps)
            / sum(seconds for _, seconds in steps),
            "over_padded": median(
                mine / theirs for mine, theirs in zip(rates, padded, strict=True)
            ),
            "tokens_per_step": sum(tokens for tokens, _ in steps) / len(steps),
        }
    return figures


def main() -> None:
    args = parse()
    folder = sft_case.prepare(args.tokenizer_dir)
    import torch

    from coati.dataset import load_tokenized_dataset
    from coati.models import load_tokenizer
    from coati.utils.json_io import save_json

    rows = load_tokenized_dataset(str(folder / "arrow"))
    by_rows, by_packs = loaders(rows, load_tokenizer(str(folder / "model")), args.max_length)
    engine = make_engine(folder)
    figures = summary(measure(engine, by_rows, by_packs, args.rounds))
    print(by_packs.epoch_order.describe_packing(by_packs.batch_size))
    for way, values in figures.items():
        rate, ratio, tokens = (
            values[name] for name in ("tokens_per_second", "over_padded", "tokens_per_step")
        )
        print(f"{way:13} {rate:7.0f} tokens/s  {ratio:.2f} x padded  {tokens:6.0f} tokens a step")
    if args.output:
        load = os.getloadavg()[0]
        threads = torch.get_num_threads()
        about = {
            "rounds": args.rounds,
            "max_length": args.max_length,
            "threads": threads,
            "load_average": load,
        }
        save_json(figures | by_packs.figures | about, args.output)


if __name__ == "__main__":
    main()
