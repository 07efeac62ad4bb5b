"""One batch of rollouts in two ways; each worker process of bench_rollout.py runs one.

    python benchmarks/rollout_ways.py WAY STEPS CASE

A batch is made for each line on standard input, and printed as a line of JSON.
"""

import ast
import json
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import sft_case  # noqa: E402

MODES = ("greedy", "sampled")
WAYS = ("coati", "transformers")
STOP_SHARE = 48  # one in so many tokens ends an answer
PAD = 2


def make_model(path: str | None):
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if path:
        return AutoModelForCausalLM.from_pretrained(path, torch_dtype=torch.float32)
    torch.manual_seed(0)
    # Larger weights than a new model's: its likeliest tokens then wander instead of repeating one.
    return LlamaForCausalLM(LlamaConfig(**sft_case.MODEL, initializer_range=0.1))


def prompts(step: int, case: dict, vocabulary: int) -> tuple[list[list[int]], list[int], list[int]]:
    """The prompts of a turn, the stop tokens, and the most tokens of each answer; the same for both
    ways and both modes. Equal rows have the longest prompts and nothing that stops them."""
    from_, to = case["prompt_tokens"]
    most = case["max_new_tokens"]
    generator = random.Random(step // len(MODES))
    count = case.get("prompts") or case["batch_size"]
    if case.get("equal"):
        lengths = [to] * count
        limits = [most] * count
        stops: list[int] = []
    else:
        lengths = [generator.randint(from_, to) for _ in range(count)]
        stops = random.Random(-1).sample(range(3, vocabulary), vocabulary // STOP_SHARE)
        low = most // 4 if case.get("prompts") else most
        limits = [generator.randint(low, most) for _ in range(count)]
    return (
        [[generator.randrange(3, vocabulary) for _ in range(length)] for length in lengths],
        sorted(stops),
        limits,
    )


def coati(model, case: dict) -> Callable:
    from coati.experience_maker.rollouts.rollout_engine import ModelRollout
    from coati.models.generation.loop import Sampling
    from coati.models.generation.response_table import left_pad
    from coati.models.generation.row_noise import NoiseRows
    from coati.parallel.boost import boost
    from coati.parallel.launch import launch
    from coati.parallel.plugins import ParallelOptions

    launch()
    engine = boost(model, ParallelOptions(plugin="ddp", precision="fp32"), lr=1e-5)

    def batch(step: int, rows: list, stops: list[int], limits: list[int], sampled: bool) -> list:
        rollout = ModelRollout(
            engine,
            sampling=Sampling(do_sample=sampled),
            stop_sequences=[[stop] for stop in stops],
            max_new_tokens=case["max_new_tokens"],
            pad_token_id=PAD,
        )
        rollout.rows_at_once = case["batch_size"]
        ids, mask = left_pad(rows, PAD)
        noise = NoiseRows(0, step, range(len(rows)))
        asked = rollout.ask(ids, mask, noise=noise, temperature=1.0, limits=limits)
        return asked.result().responses()

    return batch


def transformers(model, case: dict) -> Callable:
    import torch

    from coati.models.generation.response_table import left_pad

    model.eval()
    model.generation_config.eos_token_id = None  # only what is given ends an answer

    def batch(step: int, rows: list, stops: list[int], limits: list[int], sampled: bool) -> list:
        torch.manual_seed(step)
        size = case["batch_size"]
        answers = []
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            answers += some(rows[part], stops, limits[part], sampled)
        return answers

    def some(rows: list, stops: list[int], limits: list[int], sampled: bool) -> list:
        ids, mask = left_pad(rows, PAD)
        settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sampled else {}
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max(limits),
            do_sample=sampled,
            eos_token_id=stops or None,
            pad_token_id=PAD,
            **settings,
        )
        ends = set(stops)
        answers = [
            row[ids.shape[1] :][:limit] for row, limit in zip(out.tolist(), limits, strict=True)
        ]
        return [
            row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))]
            for row in answers
        ]

    return batch


def main() -> None:
    way = sys.argv[1]
    steps = int(sys.argv[2])
    case = ast.literal_eval(sys.argv[3])
    model = make_model(case["model"])
    vocabulary = model.config.vocab_size
    batch = {"coati": coati, "transformers": transformers}[way](model, case)
    print("ready", flush=True)
    for step in range(steps):
        rows, stops, limits = prompts(step, case, vocabulary)
        sft_case.wait_for_turn()
        started = time.perf_counter()
        worked = time.process_time()
        answers = batch(step, rows, stops, limits, MODES[step % len(MODES)] == "sampled")
        seconds = time.perf_counter() - started
        processor = time.process_time() - worked
        lengths = [len(answer) for answer in answers]
        figures = {
            "seconds": seconds,
            "processor_seconds": processor,
            "tokens": sum(lengths),
            "lengths": lengths,
        }
        print(json.dumps(figures | {"answers": answers}), flush=True)
    print(
        json.dumps({"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}),
        flush=True,
    )


if __name__ == "__main__":
    main()
