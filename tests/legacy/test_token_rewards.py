"""Reward functions under their old names and old call."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from coati.models import RLVRRewardModel
from coati.utils.reward_score import (
    extract_solution,
    gsm8k_reward_fn,
    math_competition_reward_fn,
    validate_response_structure,
)
from tests.tiny import tiny_tokenizer

RIGHT, WRONG, BARE = (
    "<think>2+2</think><answer>4</answer>",
    "<think>2+2</think><answer>5</answer>",
    "4",
)
TAGS = {
    name: {"text": text, "num_occur": 1}
    for name, text in (
        ("think_start", "["),
        ("think_end", "]"),
        ("answer_start", "{"),
        ("answer_end", "}"),
    )
}


def batch(*responses: str) -> dict:
    """Rows "how are you?" + response + end, padded on the right, as a reward model gets them."""
    tokenizer = tiny_tokenizer()
    prompt = tokenizer.encode("how are you?")
    answers = [[*tokenizer.encode(response), tokenizer.eos_token_id] for response in responses]
    width = len(prompt) + max(map(len, answers))
    rows = [prompt + answer for answer in answers]
    return {
        "input_ids": torch.tensor(
            [row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows]
        ),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        "response_start": [len(prompt)] * len(rows),
        "response_end": [len(row) for row in rows],
    }


def test_the_old_call_by_hand():
    model = RLVRRewardModel([gsm8k_reward_fn], tokenizer=tiny_tokenizer(), tags=None)
    assert model(**batch(RIGHT, WRONG, BARE), gt_answer=["4", "4", "4"]).tolist() == [10, 1, 0]
    assert model(**batch(RIGHT), gt_answer=[None]).tolist() == [0]
    own = RLVRRewardModel([gsm8k_reward_fn], tokenizer=tiny_tokenizer(), tags=TAGS)
    assert own(**batch("[a]{4}", RIGHT), gt_answer=["4", "4"]).tolist() == [10, 0]


def test_functions_add_up_and_get_what_they_always_got():
    seen = []

    def own(input_ids, attention_mask, **keywords):
        seen.append((input_ids.shape, int(attention_mask.sum()), keywords))
        return torch.tensor(0.5)

    model = RLVRRewardModel([math_competition_reward_fn, own], tokenizer=tiny_tokenizer(), extra=7)
    given = batch(r"<think>a</think><answer>\frac{8}{2}</answer>", BARE)
    assert model(**given, gt_answer=["4", "4"]).tolist() == [10.5, 0.5]
    shape, real, keywords = seen[1]
    assert shape == given["input_ids"].shape[1:] and real == given["response_end"][1]
    assert set(keywords) == {"response_start", "response_end", "gt_answer", "tokenizer", "extra"}
    assert model.to("cpu").eval() is model


def test_what_is_wrong_is_named():
    with pytest.raises(ValueError, match="reward_fn_list: expected functions"):
        RLVRRewardModel([])
    with pytest.raises(ValueError, match="gsm8k_reward_fn: called without tokenizer"):
        RLVRRewardModel([gsm8k_reward_fn])(**batch(RIGHT), gt_answer=["4"])
    with pytest.raises(ValueError, match="gt_answer: 1 values for 2 rows"):
        RLVRRewardModel([lambda *ids, **keywords: 0])(**batch(RIGHT, BARE), gt_answer=["4"])

    def broken(*ids, **keywords):
        return float("nan")

    with pytest.raises(ValueError, match="reward function broken gave nan for row 0"):
        RLVRRewardModel([broken])(**batch(RIGHT))


def test_the_tag_functions_of_old():
    assert extract_solution(RIGHT) == ("4", RIGHT) and extract_solution(BARE) == (None, BARE)
    assert validate_response_structure(RIGHT) and not validate_response_structure(BARE)
    assert validate_response_structure("[a]{4}", TAGS) and not validate_response_structure("[a]{4}")


def test_the_old_place_loads_nothing_before_a_name_is_used():
    program = (
        "import sys, coati.utils.reward_score as old;before = [name for name in ('coati.rewards', "
        "'torch') if name in sys.modules];old.gsm8k_reward_fn; print(before, "
        "'coati.legacy.token_rewards' in sys.modules, old.__all__)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=300,
    )
    names = [
        "extract_solution",
        "gsm8k_reward_fn",
        "math_competition_reward_fn",
        "validate_response_structure",
    ]
    assert run.stdout == f"[] True {names}\n", run.stderr
