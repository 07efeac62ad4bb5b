"""Which rows ``--eval_ratio`` holds out."""

import numpy as np
import pytest
from datasets import Dataset

from coati.recipes.eval_split import evaluation_mask


def sft(prompts: list[int]) -> Dataset:
    """A row for each prompt, with a response of its own."""
    rows = [[7, prompt, prompt + 1] for prompt in prompts]
    return Dataset.from_dict(
        {
            "input_ids": [[*row, 500 + place] for place, row in enumerate(rows)],
            "labels": [[-100] * 3 + [500 + place] for place in range(len(rows))],
        }
    )


PAIRS = Dataset.from_dict(
    {
        "chosen_input_ids": [[1, p, 90 + i] for i, p in enumerate([5, 6, 5, 8, 9, 10])],
        "chosen_loss_mask": [[False, False, True]] * 6,
    }
)
LABELED = Dataset.from_dict({"prompt": [[1, p] for p in [5, 6, 5, 8, 9, 10]]})
ASKED = Dataset.from_dict({"input_ids": [[1, p] for p in [5, 6, 5, 8, 9, 10]]})


@pytest.mark.parametrize("ratio, count", [(0.1, 10), (0.25, 25), (0.001, 1), (0.5, 50)])
def test_so_many_rows_are_held_out(ratio, count):
    assert evaluation_mask(sft(list(range(100))), "sft", ratio, 42).sum() == count


def test_the_seed_draws_them_and_nothing_else_does():
    rows = sft(list(range(100)))
    first = evaluation_mask(rows, "sft", 0.2, 42)
    assert (first == evaluation_mask(rows, "sft", 0.2, 42)).all()
    assert (first != evaluation_mask(rows, "sft", 0.2, 43)).any()
    # In another order the same rows, those of a selection too, which an index stands for.
    order = np.random.default_rng(0).permutation(100)
    assert (evaluation_mask(rows.select(order), "sft", 0.2, 42) == first[order]).all()


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
def test_rows_of_one_prompt_stay_together(ratio):
    prompts = [number // 3 for number in range(90)]
    held = evaluation_mask(sft(prompts), "sft", ratio, 42)
    sides: dict[int, set[bool]] = {}
    for prompt, side in zip(prompts, held, strict=True):
        sides.setdefault(prompt, set()).add(bool(side))
    assert all(len(found) == 1 for found in sides.values())
    assert held.sum() == round(ratio * 90)


@pytest.mark.parametrize("type, rows", [("preference", PAIRS), ("kto", LABELED), ("prompt", ASKED)])
def test_every_type_goes_by_its_prompt(type, rows):
    for seed in range(20):
        held = evaluation_mask(rows, type, 0.34, seed)
        assert held[0] == held[2] and 1 <= held.sum() <= 2


def test_plain_text_goes_by_the_whole_row():
    rows = Dataset.from_dict(
        {"input_ids": [[1, n] for n in range(20)], "labels": [[1, n] for n in range(20)]}
    )
    assert evaluation_mask(rows, "sft", 0.25, 42).sum() == 5


def test_one_prompt_alone_cannot_be_split():
    with pytest.raises(ValueError, match="--eval_ratio 0.1: all 6 rows have the same prompt"):
        evaluation_mask(sft([3] * 6), "sft", 0.1, 42)


def test_of_large_groups_the_smallest_is_held_out():
    held = evaluation_mask(sft([1] * 5 + [2] * 3 + [3] * 8), "sft", 0.1, 42)
    assert held.tolist() == [False] * 5 + [True] * 3 + [False] * 8


def test_more_rows_than_a_chunk():
    assert evaluation_mask(sft(list(range(2500))), "sft", 0.1, 42).sum() == 250
