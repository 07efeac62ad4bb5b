"""The preference benchmarks compare like with like: every way takes the same steps on the same
pairs."""

import json
import random
from pathlib import Path

import pytest

from tests.distributed.spawn import run

STEPS, PAIRS = 3, 2
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "vocab_size": 97,
    "tie_word_embeddings": True,
    "pad_token_id": 2,
}


def pairs() -> list[dict]:
    generator = random.Random(0)

    def some(low: int, high: int) -> list[int]:
        return [generator.randrange(3, 97) for _ in range(generator.randint(low, high))]

    return [
        {"prompt_ids": some(4, 9), "chosen_ids": some(2, 6), "rejected_ids": some(2, 6)}
        for _ in range(5)
    ]


def losses_of_ways(folder: str) -> dict[str, list[float]]:
    """In a worker: {way: its losses}."""
    from benchmarks import preference_case as case
    from benchmarks.preference_ways import WAYS

    place, found = Path(folder), {}
    case.write_models(place, TINY)
    (place / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs()))
    for way, start in WAYS.items():
        taken = start(place, case.read(place, STEPS * PAIRS), PAIRS)
        found[way] = [next(taken)[1] for _ in range(STEPS) if next(taken) is None]
    return found


@pytest.fixture(scope="module")
def losses(tmp_path_factory) -> dict[str, list[float]]:
    folder = str(tmp_path_factory.mktemp("case"))
    return run(
        1,
        "tests.benchmarks.test_preference_ways:losses_of_ways",
        folder,
        env={"CUDA_VISIBLE_DEVICES": ""},
    )[0]


@pytest.mark.parametrize("algorithm", ["dpo", "rm"])
def test_the_plain_way_takes_the_same_steps(losses, algorithm):
    assert losses[algorithm] == pytest.approx(losses[f"{algorithm}_plain"], rel=2e-5)
    assert len(set(losses[algorithm])) == STEPS == len(losses["dpo_stored"])


def test_tokens_are_counted_of_both_sides_without_padding():
    from benchmarks import preference_case as case

    row = {"prompt_ids": [5, 6, 7], "chosen_ids": [8], "rejected_ids": [9, 10]}
    assert case.counted([row, row]) == {"tokens": 18, "supervised": 6}
