"""Load time, speed and memory of a model."""

import json
import multiprocessing
import time
from typing import Any

from coati.cli.program_settings import BenchmarkSettings
from coati.cli.quantize import FULL, benchmark_parser, parse_benchmark
from coati.cli.verb import Verb
from coati.utils.output_paths import with_folder

VERB = Verb(
    "models",
    benchmark_parser,
    parse_benchmark,
    "coati.recipes.verbs.measure:main",
    subject="--model_path",
)


def measure(args: BenchmarkSettings, quant: str, results) -> None:
    """Runs in its own process, so that the peak memory is that of one kind of weights."""
    from coati.inference import load
    from coati.inference.export import measures
    from coati.utils.memory import peak_memory_mb

    try:
        start = time.perf_counter()
        loaded = load(
            args.model_path,
            quant=None if quant == FULL else quant,
            trust_remote_code=args.trust_remote_code,
            beta_gen=args.beta_gen,
        )
        figures: dict[str, Any] = {
            "weights": quant,
            "load_seconds": time.perf_counter() - start,
            "tokens_per_second": {},
        }
        for batch in args.batch_size:
            speed = measures.speed_of(loaded, batch, args.prompt_tokens, args.new_tokens)
            figures["tokens_per_second"][batch] = speed.tokens_per_second
            figures.setdefault("first_token_seconds", speed.first_token_seconds)
        results.send(figures | {"peak_memory_mb": peak_memory_mb()})
    except (ValueError, OSError) as error:
        results.send(str(error))


def in_a_process(args: BenchmarkSettings, quant: str) -> dict:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(args, quant, theirs))
    process.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        process.join()
        found = f"the process ended with exit code {process.exitcode}"
    process.join()
    if isinstance(found, str):
        raise ValueError(f"{quant}: {found}")
    return found


def show(found: list[dict], batches: list[int]) -> None:
    columns = "".join(f"{f'tokens/s x{batch}':>14}" for batch in batches)
    print(f"{'weights':8}{'load s':>9}{'first token s':>15}{columns}{'peak MiB':>11}")
    for one in found:
        rates = "".join(f"{one['tokens_per_second'][batch]:14.1f}" for batch in batches)
        row = f"{one['weights']:8}{one['load_seconds']:9.2f}{one['first_token_seconds']:15.3f}"
        print(f"{row}{rates}{one['peak_memory_mb']:11.0f}")


def main(args: BenchmarkSettings) -> None:
    found = [in_a_process(args, quant) for quant in args.quant]
    show(found, args.batch_size)
    if args.output:
        with_folder(args.output).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
