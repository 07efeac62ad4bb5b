"""Tokens per second of the serving engine: requests one after the other, and all at the same time.

    python benchmarks/bench_serving.py --model_path models/smollm2 --requests 8 --max_new_tokens 64

Greedy answers; it also says whether those given together are those given alone.
"""

import argparse
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

QUESTIONS = (
    "How far is the moon?",
    "What do bees eat?",
    "Name three rivers of Europe.",
    "Why is the sky blue?",
    "Write a short story about a cat.",
    "How do I boil an egg?",
    "What is a prime number?",
    "Who wrote Hamlet?",
)


class Asked:
    """One request to ``engine`` and its response."""

    def __init__(self, engine, number: int, new: int):
        from coati.inference.serve.inference_engine import SamplingParams
        from coati.models.generation.sampling import Sampling

        self._done = threading.Event()
        self.text = ""
        prompt = engine.encode(
            [{"role": "user", "content": f"{number}. {QUESTIONS[number % len(QUESTIONS)]}"}]
        )
        self.request = engine.submit(
            prompt, SamplingParams(Sampling(do_sample=False), new), self._take
        )

    def _take(self, chunk) -> None:
        self.text += chunk.text
        if chunk.finish:
            self._done.set()

    def wait(self) -> "Asked":
        self._done.wait()
        return self


def timed(engine, arguments, together: bool) -> tuple[float, list[str]]:
    """Tokens per second, and the texts."""
    start = time.perf_counter()
    asked = []
    for number in range(arguments.requests):
        asked.append(Asked(engine, number, arguments.max_new_tokens))
        if not together:
            asked[-1].wait()
    tokens = sum(len(each.wait().ticket.row.tokens) for each in asked)
    return tokens / (time.perf_counter() - start), [each.text for each in asked]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_path", required=True)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    arguments = parser.parse_args()
    from coati.inference.model_loading import load
    from coati.inference.serve.inference_engine import InferenceEngine

    engine = InferenceEngine(
        load(arguments.model_path), max_batch=arguments.requests, max_queue=arguments.requests
    )
    timed(engine, argparse.Namespace(requests=1, max_new_tokens=4), together=False)
    alone, texts = timed(engine, arguments, together=False)
    together, texts_together = timed(engine, arguments, together=True)
    engine.close()
    print(
        f"one after the other {alone:.1f} tokens/s, {arguments.requests} together {together:.1f} "
        "tokens/s: ",
        end="",
    )
    print(f"{together / alone:.2f} times as many; same answers: {texts == texts_together}")


if __name__ == "__main__":
    main()
