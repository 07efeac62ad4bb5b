"""Evaluation on held-out prompts: pass@k of several responses to each."""

from types import SimpleNamespace

import pytest
import torch

from coati.dataset.load.loader import EvaluationLoader
from coati.trainer.rl_evaluation import EVALUATION, PassAt, evaluate_policy
from coati.utils.logging import forget_warnings
from tests.trainer.test_online import Collate, Maker, Rows

PASS = PassAt((1, 2, 4), 4, lambda batch: batch.samples["right"].bool())


class Answers(Maker):
    """The first n of the responses to prompt n are right."""

    def __init__(self) -> None:
        super().__init__()
        self.indices: list[int] = []

    def rollout_and_score(self, batch, rows, episode, temperature, num_generations=1):
        assert (episode, temperature) == (EVALUATION, 0.7)
        ids = batch["input_ids"].repeat_interleave(num_generations, 0)
        found = super().rollout_and_score(
            batch | {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            rows,
            episode,
            temperature,
        )
        self.indices += rows
        number = torch.arange(len(rows)) % num_generations
        found.samples["prompt"] = (ids[:, 0] - 10).float()
        found.samples["right"] = (number < ids[:, 0] - 10).float()
        return found


def test_pass_at_k_by_hand():
    """Of 4 responses 0, 1, 2 and 3 are right: 1 - C(4 - c, k) / C(4, k)."""
    found = PASS.metrics([0, 1, 2, 3])
    assert found["pass_at_1"] == pytest.approx((0 + 1 / 4 + 2 / 4 + 3 / 4) / 4)
    assert found["pass_at_2"] == pytest.approx((0 + 3 / 6 + 5 / 6 + 1) / 4)
    assert found["pass_at_4"] == pytest.approx(3 / 4)
    for k in PASS.ks:
        assert found[f"pass_at_{k}_low"] <= found[f"pass_at_{k}"] <= found[f"pass_at_{k}_high"]
        assert found[f"pass_at_{k}_high"] - found[f"pass_at_{k}_low"] > 0.1
    assert PASS.metrics([2]).keys() == {"pass_at_1", "pass_at_2", "pass_at_4"}


def test_every_response_of_a_prompt_has_noise_of_its_own():
    maker = Answers()
    loader = EvaluationLoader(Rows(3), Collate(), batch_size=2)
    found = evaluate_policy(maker, loader, 0.7, PASS)
    # prompts 0, 1 and 2, the last beside a blank one that repeats the first
    assert maker.indices == [*range(12), 0, 1, 2, 3]
    assert found.metrics["pass_at_1"] == pytest.approx((0 + 1 / 4 + 2 / 4) / 3)
    assert found.metrics["right"] == pytest.approx(3 / 12) and len(found.shown) == 12
    assert "pass_at_1 0.25, pass_at_1_low" in found.summary()
    alone = Answers()
    plain = evaluate_policy(alone, EvaluationLoader(Rows(3), Collate(), batch_size=2), 0.7)
    assert alone.indices == [0, 1, 2, 0] and "pass_at_1" not in plain.metrics


def test_which_responses_are_right():
    from coati.recipes.reward_sets import _all_right, _reaches, _values_of_right

    nan = float("nan")
    parts = {"gsm8k": torch.tensor([10.0, 1, nan, nan]), "length": torch.zeros(4)}
    parts["python_tests"] = torch.tensor([nan, nan, 1.0, 0.5])
    batch = SimpleNamespace(reward_parts=parts)
    values = _values_of_right(dict.fromkeys(parts, 1.0))
    assert values == {"gsm8k": 10.0, "python_tests": 1.0}
    assert _all_right(values, batch).tolist() == [1, 0, 1, 0]
    nowhere = SimpleNamespace(reward_parts={"gsm8k": torch.tensor([nan])})
    assert _all_right({"gsm8k": 10.0}, nowhere).isnan().tolist() == [True]
    scored = SimpleNamespace(experience=SimpleNamespace(reward=torch.tensor([0.5, 2.0])))
    assert _reaches(1.0, scored).tolist() == [False, True]


def test_prompts_of_which_nothing_says_what_is_right_do_not_count(caplog):
    """Of the prompts 0, 1 and 2, of whose 4 responses so many are right, the last one's rewards
    tell nothing."""
    forget_warnings()

    def evaluated(untold):
        def right(batch):
            number = batch.samples["prompt"]
            return batch.samples["right"].masked_fill(number >= untold, float("nan"))

        loader = EvaluationLoader(Rows(3), Collate(), batch_size=2)
        return evaluate_policy(Answers(), loader, 0.7, PassAt((1,), 4, right)).metrics

    with caplog.at_level("WARNING", "coati"):
        assert evaluated(2)["pass_at_1"] == pytest.approx((0 + 1 / 4) / 2)
    assert "of 1 of 3 evaluation prompts no reward says which" in " ".join(caplog.messages)
    assert "pass_at_1" not in evaluated(0)
