"""Batches of rollouts by one system; a worker of bench_rollout_peers.py.

    python benchmarks/rollout_peers.py WAY STEPS CASE FOLDER

Beside the ways of rollout_ways.py: ``continuous``, transformers' continuous batching
(``generate_batch``), and ``vllm``, which runs with the interpreter of vLLM's environment. FOLDER
holds the model. A batch is made for each line on standard input, and printed as a line of JSON.
"""

import ast
import json
import logging
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import rollout_ways, sft_case  # noqa: E402
from benchmarks.rollout_ways import MODES, PAD, prompts  # noqa: E402

# step, rows of prompts, stop tokens, most new tokens of each, whether sampled -> responses
Sample = Callable[[int, list[list[int]], list[int], list[int], bool], list[list[int]]]
PAGE = 32  # tokens of a page of the continuous batching's cache


def continuous(folder: str, case: dict[str, Any]) -> Sample:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = rollout_ways.make_model(folder)
    model.eval()
    longest = case["prompt_tokens"][1] + case["max_new_tokens"]
    # Without a size it reserves most of the memory of the machine.
    cache = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=case["batch_size"] * -(-longest // PAGE),
        max_batch_tokens=case["batch_size"] * case["prompt_tokens"][1],
        allow_block_sharing=False,
    )

    def batch(
        step: int, rows: list[list[int]], stops: list[int], limits: list[int], sampled: bool
    ) -> list[list[int]]:
        config = GenerationConfig(
            max_new_tokens=max(limits),
            do_sample=sampled,
            eos_token_id=stops,
            pad_token_id=PAD,
            **({"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sampled else {}),
        )
        found = model.generate_batch(rows, config, cache, progress_bar=False)
        if len(found) < len(rows) or any(one.error for one in found.values()):
            raise RuntimeError(f"generate_batch finished {len(found)} of {len(rows)} prompts")
        return [one.generated_tokens for one in found.values()]

    return batch


def vllm(folder: str, case: dict[str, Any]) -> Sample:
    logging.disable(logging.WARNING)
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder,
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=512,
        enable_prefix_caching=False,
    )

    def batch(
        step: int, rows: list[list[int]], stops: list[int], limits: list[int], sampled: bool
    ) -> list[list[int]]:
        params = [
            SamplingParams(
                temperature=1.0 if sampled else 0.0,
                max_tokens=limit,
                stop_token_ids=stops,
                detokenize=False,
            )
            for limit in limits
        ]
        asked = [{"prompt_token_ids": row} for row in rows]
        found = llm.generate(asked, params, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in found]

    return batch


def of_ways(way: str) -> Callable[[str, dict[str, Any]], Sample]:
    def make(folder: str, case: dict[str, Any]) -> Sample:
        model = rollout_ways.make_model(folder)
        return {"coati": rollout_ways.coati, "generate": rollout_ways.transformers}[way](
            model, case
        )

    return make


WAYS: dict[str, Callable[[str, dict[str, Any]], Sample]] = {
    "coati": of_ways("coati"),
    "generate": of_ways("generate"),
    "continuous": continuous,
    "vllm": vllm,
}


def main() -> None:
    way = sys.argv[1]
    steps = int(sys.argv[2])
    case = ast.literal_eval(sys.argv[3])
    folder = sys.argv[4]
    batch = WAYS[way](folder, case)
    vocabulary = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
    print("ready", flush=True)
    for step in range(steps):
        rows, stops, limits = prompts(step, case, vocabulary)
        sft_case.wait_for_turn()
        started = time.perf_counter()
        answers = batch(step, rows, stops, limits, MODES[step % len(MODES)] == "sampled")
        seconds = time.perf_counter() - started
        tokens = sum(map(len, answers))
        print(json.dumps({"seconds": seconds, "tokens": tokens, "answers": answers}), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak_mb": peak}), flush=True)


if __name__ == "__main__":
    main()
