"""What models are shown of an experience, and which of their numbers belongs to which action."""

import pytest
import torch
from torch.testing import assert_close

from coati.experience_maker.model_inputs import (
    action_logprobs,
    critic_batch,
    policy_batch,
    reward_batch,
    scores,
    state_values,
    to_actions,
)
from coati.parallel.inference_model import InferenceModel
from tests.experience_maker.engines import engine_of, group_of_one
from tests.experience_maker.stubs import StubEngine
from tests.experience_maker.test_experience import ANSWERS, PROMPTS, experience
from tests.tiny import tiny_llama


def test_the_critic_reads_the_state_before_each_action():
    token = StubEngine(lambda batch: batch["input_ids"].float())
    assert state_values(token, experience()).tolist() == [[13, 14, 0], [21, 22, 23], [32, 0, 0]]
    position = StubEngine(
        lambda batch: torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    )
    assert state_values(position, experience()).tolist() == [[2, 3, 0], [0, 1, 2], [1, 0, 0]]


def test_the_same_of_rows_laid_end_to_end():
    flat = StubEngine(
        lambda batch: batch["input_ids"][batch["attention_mask"].bool()].float()[None]
    )
    assert state_values(flat, experience(left=2, right=1)).tolist() == [
        [13, 14, 0, 0],
        [21, 22, 23, 0],
        [32, 0, 0, 0],
    ]


def test_models_are_given_rows_padded_on_the_right():
    for make in (policy_batch, critic_batch, reward_batch):
        batch = make(experience(left=3, right=2))
        assert batch["attention_mask"].tolist() == [
            [1, 1, 1, 1, 1],
            [1, 1, 1, 1, 0],
            [1, 1, 1, 0, 0],
        ]
        lengths = batch["attention_mask"].sum(1)
        real = [
            row[:length].tolist() for row, length in zip(batch["input_ids"], lengths, strict=True)
        ]
        assert real == [prompt + answer for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    assert policy_batch(experience())["labels"].tolist()[1] == [-100, 22, 23, 24, -100]


def test_rows_that_are_dropped_have_no_labels_but_are_read():
    one = experience()
    one.action_mask[1] = False
    assert (policy_batch(one)["labels"][1] == -100).all() and not critic_batch(one)["states"][
        1
    ].any()
    assert policy_batch(one)["attention_mask"][1].tolist() == [1, 1, 1, 1, 0]
    token = StubEngine(lambda batch: batch["input_ids"].float())
    assert state_values(token, one).tolist() == [[13, 14, 0], [0, 0, 0], [32, 0, 0]]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with group_of_one(tmp_path_factory.mktemp("group")):
        yield tiny_llama().eval()


def plain_logps(model, prompt: list[int], answer: list[int], temperature: float) -> list[float]:
    """Of the unpadded row alone."""
    with torch.no_grad():
        logits = (
            model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            / temperature
        )
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0].tolist()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", [None, 2])
def test_log_probs_are_those_of_each_row_alone(model, packed, size):
    engine = engine_of(model, packed)
    engine.temperature = 0.7
    found = action_logprobs(
        InferenceModel(engine), experience(left=2, right=3, junk=float("nan")), size
    )
    for row, prompt, answer in zip(found, PROMPTS, ANSWERS, strict=True):
        assert_close(
            row[: len(answer)].tolist(),
            plain_logps(model, prompt, answer, 0.7),
            rtol=1e-5,
            atol=1e-5,
        )
        assert not row[len(answer) :].any()


def test_scores_are_of_whole_rows_in_their_order():
    total = StubEngine(lambda batch: (batch["input_ids"] * batch["attention_mask"]).sum(1))
    expected = [sum(prompt + answer) for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    for size in (None, 1, 2):
        assert scores(total, experience(left=1), size).tolist() == expected


def test_numbers_find_their_actions():
    mask = torch.tensor([[True, True, False], [False, False, False], [True, False, False]])
    assert to_actions(torch.tensor([1.0, 2.0, 3.0]), mask).tolist() == [
        [1, 2, 0],
        [0, 0, 0],
        [3, 0, 0],
    ]
