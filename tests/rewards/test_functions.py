"""The registered rewards and the tags."""

import json
from pathlib import Path

import pytest

from coati.rewards.functions import (
    FUNCTIONS,
    format_reward_fn,
    gsm8k_reward_fn,
    length_reward_fn,
    math_competition_reward_fn,
    per_row,
)
from coati.rewards.registry import REWARDS
from coati.rewards.responses import Responses
from coati.rewards.tags import extract_solution, validate_response_structure

TEMPLATE = Path(__file__).parents[2] / "config" / "conversation_template" / "Qwen_Qwen2.5-3B.json"
TAGS = json.loads(TEMPLATE.read_text(encoding="utf-8"))["response_format_tags"]
GOOD = "<think>2 and 2</think>\n<answer> 4 </answer>"


def test_every_row_of_the_table_has_its_function():
    assert FUNCTIONS.keys() == {name for name, row in REWARDS.items() if not row.beside}


@pytest.mark.parametrize(
    ("name", "lacks"), [("gsm8k", "has no gt_answer"), ("length", "max_new_tokens")]
)
def test_what_a_batch_lacks_is_named(name, lacks):
    with pytest.raises(ValueError, match=lacks):
        per_row(name, Responses(["p"], ["4"]), 0)


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        (GOOD, True),
        ("Sure. " + GOOD + "\n", True),
        (GOOD + " That is it.", False),  # it goes on behind the answer
        (GOOD + GOOD, False),
        ("<answer>4</answer><think>2 and 2</think>", False),
        ("<think>2<answer>4</answer></think>", False),
        (
            "<answer><think>2</think>4</answer>",
            False,
        ),  # ends as it should, but the thoughts are in the answer
        ("</think>2<think><answer>4</answer>", False),
        ("<think>2 and 2 <answer>4</answer>", False),
        ("<think></think><answer></answer>", True),
        ("4", False),
        ("", False),
    ],
)
def test_structure(text, valid):
    assert validate_response_structure(text, TAGS) is valid
    assert format_reward_fn(text, TAGS) == valid


def test_a_tag_that_the_prompt_holds_has_no_place():
    tags = TAGS | {"think_start": {"text": "<think>", "num_occur": 0}}
    assert validate_response_structure("2 and 2</think><answer>4</answer>", tags)
    assert not validate_response_structure(GOOD, tags)


@pytest.mark.parametrize(
    "change",
    [
        {"think_end": None},
        {"think_end": {"text": ""}},
        {"think_end": {"text": "a", "num_occur": "1"}},
        {"think_end": {"text": "a", "num_occur": -1}},
    ],
)
def test_tags_of_another_form_are_named(change):
    with pytest.raises(ValueError, match="response_format_tags: think_end is .*expected"):
        validate_response_structure(GOOD, TAGS | change)


def test_the_last_answer_counts():
    assert extract_solution("<answer>1</answer> no: <answer>\n2\n</answer>") == "2"
    assert extract_solution("<answer>1") is None
    other = TAGS | {
        "answer_start": {"text": "[", "num_occur": 1},
        "answer_end": {"text": "]", "num_occur": 1},
    }
    assert extract_solution("<answer>1</answer>[3]", other) == "3"


@pytest.mark.parametrize(
    ("response", "truth", "tags", "reward"),
    [
        ("The sum is 7", "7", None, 10),
        ("The sum is 8", "7", None, 1),
        ("I cannot say", "7", None, 0),
        ("It is 3.5", "7", None, 0),  # no whole number
        ("$1,234", "1234", None, 10),
        ("17 * 27 = 459", "17 people ... #### 459", None, 10),  # a worked solution as ground truth
        (r"\boxed{-2}", "-2", None, 10),
        (GOOD, "4", None, 10),
        (GOOD, "4", TAGS, 10),
        (GOOD, "5", TAGS, 1),
        ("4", "4", TAGS, 0),  # right, but not in due form
        ("<think>a</think><answer>four</answer>", "4", TAGS, 0),
    ],
)
def test_gsm8k(response, truth, tags, reward):
    assert gsm8k_reward_fn(response, truth, tags) == reward


@pytest.mark.parametrize(
    ("response", "truth", "tags", "reward"),
    [
        (r"hence \boxed{\frac{1}{2}}", "0.5", None, 10),
        (r"hence \boxed{x}", "0.5", None, 1),
        (r"<think>a</think><answer>\frac{\pi}{2}</answer>", r"$\dfrac{\pi}{2}$", TAGS, 10),
        (r"<think>a</think><answer></answer>", "1", TAGS, 0),
        (r"\frac{\pi}{2}", r"\frac{\pi}{2}", TAGS, 0),
        ("no idea", "1", None, 0),
    ],
)
def test_math_competition(response, truth, tags, reward):
    assert math_competition_reward_fn(response, truth, tags) == reward


def test_length():
    assert [length_reward_fn(n, 10) for n in (0, 5, 10)] == [0, -0.5, -1]
