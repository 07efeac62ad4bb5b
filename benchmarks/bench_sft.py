"""SFT speed of this machine: tokens/s, and the share of its own matrix rate that forward + backward
reach.

A 28M-parameter Llama in fp32 on real conversations, batch 8, through the library's own boost,
Engine and SFTTrainer. The matrix rate is measured between the steps of the same run, so another job
on the machine slows both. Padding is not
counted: tokens are real tokens, and sft_case.flops counts the work they need.

    python benchmarks/bench_sft.py [--steps 40] [--plugin ddp] [--tokenizer_dir MODEL] [--output
    results.json]
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import sft_case  # noqa: E402

WARM_UP = 3  # steps before counting begins: thread pools, memory, caches


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument(
        "--plugin",
        default="ddp",
        help="ddp: in one process nothing is exchanged and nothing copied",
    )
    parser.add_argument(
        "--tokenizer_dir", help="default: SmolLM2, made by examples/demo/smollm2.py"
    )
    parser.add_argument("--batch_size", type=int, default=sft_case.BATCH_SIZE)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", help="write the figures as JSON")
    parser.add_argument(
        "--paced", action="store_true", help="wait for a line on standard input before each step"
    )
    return parser.parse_args()


def make_trainer(folder: Path, plugin: str, steps: int, batch: int = sft_case.BATCH_SIZE):
    """The library's public path: ``boost`` and ``SFTTrainer``, constant learning rate, rows in the
    file's order."""
    from coati.dataset import DataCollatorForSupervisedDataset, load_tokenized_dataset
    from coati.dataset.load.loader import GlobalBatchLoader
    from coati.models import load_causal_lm, load_tokenizer
    from coati.parallel.boost import boost
    from coati.parallel.launch import launch
    from coati.parallel.plugins import ParallelOptions
    from coati.trainer import RunSchedule, SFTTrainer

    launch()
    options = ParallelOptions(plugin=plugin, precision="fp32", grad_clip=sft_case.MAX_NORM)
    model = load_causal_lm(str(folder / "model"), dtype="fp32")
    # A schedule a million times as long as the run: its learning rate stays where it starts.
    keywords = {
        "lr": sft_case.LEARNING_RATE,
        "weight_decay": 0.0,
        "warmup_steps": 0,
        "total_steps": steps * 10**6,
    }
    engine = boost(model, options, **keywords)
    rows = load_tokenized_dataset(str(folder / "arrow"))
    collate = DataCollatorForSupervisedDataset(load_tokenizer(str(folder / "model")), 512)
    loader = GlobalBatchLoader(rows, collate, batch_size=batch, shuffle=False)
    epochs = -(-steps // len(loader))
    return SFTTrainer(
        engine=engine,
        max_epochs=epochs,
        accumulation_steps=1,
        schedule=RunSchedule(max_steps=steps),
    ), loader


def record_steps(engine, before_step) -> list[dict]:
    """Times of every step of ``engine`` to come: the whole step, and the optimizer's part of it
    (clipping included)."""
    steps = []
    train_step = engine.train_step
    update = engine.optimizer.step

    def timed_update(*args, **keywords):
        started = time.perf_counter()
        result = update(*args, **keywords)
        steps[-1]["optimizer_s"] = time.perf_counter() - started
        return result

    def timed_step(window, *args, **keywords):
        steps.append({"matmul_rate": before_step()})
        lengths = [n for batch in window for n in batch["attention_mask"].sum(1).tolist()]
        started = time.perf_counter()
        step = train_step(window, *args, **keywords)
        steps[-1] |= {
            "seconds": time.perf_counter() - started,
            "loss": step.loss,
            "tokens": step.tokens,
        }
        steps[-1] |= {
            "supervised": step.num_terms,
            "flops": sft_case.flops(lengths, step.num_terms),
        }
        return step

    engine.train_step = timed_step
    engine.optimizer.step = timed_update
    return steps


def summary(steps: list[dict]) -> dict:
    """Figures over the steps after the warm-up: sums of work over sums of time, the median of the
    matrix rate."""
    counted = steps[WARM_UP:]
    seconds = sum(step["seconds"] for step in counted)
    passes = sum(step["seconds"] - step["optimizer_s"] for step in counted)
    tokens = sum(step["tokens"] for step in counted)
    rate = sum(step["flops"] for step in counted) / passes
    machine = median(step["matmul_rate"] for step in counted)
    shares = sorted(
        step["flops"] / (step["seconds"] - step["optimizer_s"]) / step["matmul_rate"]
        for step in counted
    )
    return {
        "tokens_per_second": tokens / seconds,
        "matmul_gflops": machine / 1e9,
        "passes_gflops": rate / 1e9,
        "share_of_matmul_rate": rate / machine,
        "share_of_matmul_rate_quartiles": [shares[len(shares) * k // 4] for k in (1, 2, 3)],
        "optimizer_share_of_step": 1 - passes / seconds,
        "supervised_share_of_tokens": sum(step["supervised"] for step in counted) / tokens,
        "losses": [step["loss"] for step in steps],
    }


def main() -> None:
    args = parse()
    folder = args.folder or sft_case.prepare(args.tokenizer_dir)
    trainer, loader = make_trainer(folder, args.plugin, args.steps, args.batch_size)
    import torch

    from coati.utils.memory import peak_memory_mb

    if args.paced:
        print("ready", flush=True)
        before_step = sft_case.wait_for_turn
    else:
        before_step = sft_case.MatmulRate().measure
    steps = record_steps(trainer.engine, before_step)
    if args.paced:
        report_each(trainer.engine, steps)
    trainer.fit(loader)
    if args.paced:
        print(json.dumps({"peak_mb": peak_memory_mb()}), flush=True)
        return
    figures = summary(steps) | {
        "plugin": args.plugin,
        "batch_size": args.batch_size,
        "steps": args.steps - WARM_UP,
        "threads": torch.get_num_threads(),
        "peak_memory_mb": peak_memory_mb(),
        "torch": torch.__version__,
        "machine": platform.processor() or "unknown",
        "load_average": os.getloadavg()[0],
    }
    show(figures)
    if args.output:
        from coati.utils.json_io import save_json

        save_json(figures, args.output)


def show(figures: dict) -> None:
    low, middle, high = figures["share_of_matmul_rate_quartiles"]
    print(
        f"SFT of a 28M Llama in fp32, batch {figures['batch_size']}, {figures['threads']} threads, "
        f"plugin {figures['plugin']}: {figures['tokens_per_second']:.0f} tokens/s, peak "
        f"{figures['peak_memory_mb']:.0f} MiB (padding is not counted; "
        f"{figures['supervised_share_of_tokens']:.0%} of the tokens are supervised)\n"
        f"forward + backward: {figures['passes_gflops']:.0f} of this machine's own "
        f"{figures['matmul_gflops']:.0f} Gflop/s = {figures['share_of_matmul_rate']:.0%} (steps, "
        f"quartiles: {low:.0%}, {middle:.0%}, {high:.0%}); optimizer and clipping: "
        f"{figures['optimizer_share_of_step']:.0%} of the step"
    )


def report_each(engine, steps: list[dict]) -> None:
    """Print every step as a line of JSON as soon as it is done, for bench_sft_peers.py."""
    train_step = engine.train_step

    def step_and_report(*args, **keywords):
        result = train_step(*args, **keywords)
        kept = {key: steps[-1][key] for key in ("seconds", "loss", "tokens", "supervised")}
        print(json.dumps(kept), flush=True)
        return result

    engine.train_step = step_and_report


if __name__ == "__main__":
    main()
