"""A step whose micro-batches are cut by tokens is the step: loss, terms, gradients, metrics."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from coati.dataset.load.collator import (
    DataCollatorForKTODataset,
    DataCollatorForPreferenceDataset,
    DataCollatorForSupervisedDataset,
)
from coati.models.pairwise_loss import PairwiseObjective
from coati.models.reward_model import RewardModel
from coati.parallel.inference_model import InferenceModel
from coati.trainer.dpo import DPOObjective
from coati.trainer.gkd import GKDObjective
from coati.trainer.kto import KTOObjective
from coati.trainer.rm import RewardModelObjective
from coati.trainer.sft import SFTObjective
from coati.trainer.teachers import ModelTeacher
from coati.utils.meter import MaskedSamples
from tests.experience_maker.engines import engine_of, group_of_one
from tests.tiny import tiny_llama, tiny_tokenizer

LENGTHS = [(4, 3), (11, 20), (2, 2), (7, 9), (5, 30), (6, 6)]  # of prompt and response
BUDGET = 40
PAIRS = 100  # of the longest pair 84 with its padding


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    with group_of_one(tmp_path_factory.mktemp("group")):
        yield


def drawn(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 384, (count,), generator=generator).tolist()


def sft_row(number: int, prompt: int, response: int) -> dict:
    ids = drawn(prompt + response, number)
    row = {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}
    # Rows 0 and 1 are a micro-batch without weights.
    return row | ({"loss_weights": [0.5 + number] * len(ids)} if number > 1 else {})


def pair_row(number: int, prompt: int, response: int) -> dict:
    row: dict = {"margin": 0.1 * number}
    for side, more in (("chosen", 0), ("rejected", 15 - response % 16)):
        ids = drawn(prompt, number) + drawn(response + more, 10 * number + more)
        row[f"{side}_input_ids"] = ids
        row[f"{side}_loss_mask"] = [False] * prompt + [True] * (len(ids) - prompt)
    return row


def kto_row(number: int, prompt: int, response: int) -> dict:
    made = {"prompt": drawn(prompt, number), "completion": drawn(response, 50 + number)}
    return made | {"label": number % 2 == 0, "kl_completion": drawn(3, number)}


KINDS: dict[str, tuple[Callable, type]] = {
    "sft": (sft_row, DataCollatorForSupervisedDataset),
    "gkd": (sft_row, DataCollatorForSupervisedDataset),
    "dpo": (pair_row, DataCollatorForPreferenceDataset),
    "rm": (pair_row, DataCollatorForPreferenceDataset),
    "kto": (kto_row, DataCollatorForKTODataset),
}


def batches_of(kind: str, size: int) -> list[dict]:
    make, collator = KINDS[kind]
    rows = [make(number, *lengths) for number, lengths in enumerate(LENGTHS)]
    collate = collator(tiny_tokenizer(), 64)
    return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]


def taken(kind: str, size: int, budget: int | None, packed: bool):
    """The step, its gradient, and what the model was called with."""
    model = tiny_llama()
    if kind == "rm":
        torch.manual_seed(3)
        model = RewardModel(backbone=tiny_llama())
        torch.nn.init.normal_(model.score.weight, std=0.5)
    engine = engine_of(model, packed)
    engine.options = replace(engine.options, tokens_per_batch=budget)
    other = engine_of(tiny_llama(1), packed)
    other.options = engine.options
    reference = InferenceModel(other)
    objective = {
        "sft": lambda: SFTObjective(),
        "gkd": lambda: GKDObjective(ModelTeacher(reference), beta=0.3, sft_coef=0.5),
        "dpo": lambda: DPOObjective(PairwiseObjective.of("dpo_loss", sft_coef=0.2), reference),
        "rm": lambda: RewardModelObjective(center_coef=0.1),
        "kto": lambda: KTOObjective(engine, reference, desirable_weight=1.3),
    }[kind]()
    seen: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: (
            seen.append(kwargs["input_ids"].numel()) if torch.is_grad_enabled() else None
        ),
        with_kwargs=True,
    )
    step = engine.train_step(batches_of(kind, size), objective)
    return SimpleNamespace(step=step, gradient=engine.optimizer.found, seen=seen)


def samples(step) -> dict[str, torch.Tensor]:
    """Sorted: what is averaged has no order."""
    found = {}
    for name, values in step.metrics.items():
        each = [v.selected() if isinstance(v, MaskedSamples) else v for v in values]
        found[name] = torch.cat(each).sort().values
    return found


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_the_same_however_it_is_cut(kind, packed):
    plain = taken(kind, 2, None, packed)
    budget = PAIRS if kind in ("dpo", "rm") else BUDGET
    cut = taken(kind, 3, budget, packed)
    assert cut.step.loss == pytest.approx(plain.step.loss, rel=1e-5)
    assert cut.step.num_terms == pytest.approx(plain.step.num_terms)
    assert cut.step.tokens == plain.step.tokens
    assert_close(cut.gradient, plain.gradient, rtol=1e-4, atol=1e-6)
    assert len(cut.seen) > 2 and max(cut.seen) <= budget
    sums = [name for name in samples(plain.step) if name.startswith("_")]
    for name, values in samples(plain.step).items():
        if name not in sums:  # moments of a micro-batch
            assert_close(samples(cut.step)[name], values, rtol=1e-4, atol=1e-5)


def test_rows_without_padding_are_fewer_micro_batches():
    """Rows of 7, 31, 4, 16, 35 and 12 tokens: in order [7, 31], [4, 16], [35], [12]; padded the
    longest first: [35], [31], [16, 12], [7, 4]."""
    assert taken("sft", 6, BUDGET, True).seen == [38, 20, 35, 12]
    assert taken("sft", 6, BUDGET, False).seen == [35, 31, 32, 14]


@pytest.mark.parametrize("packed", [False, True])
def test_an_evaluation_too(packed):
    def evaluated(budget):
        engine = engine_of(tiny_llama(), packed)
        engine.options = replace(engine.options, tokens_per_batch=budget)
        return engine.evaluate(batches_of("sft", 6), SFTObjective())

    plain, cut = evaluated(None), evaluated(BUDGET)
    assert cut.loss == pytest.approx(plain.loss, rel=1e-5)
    assert cut.num_terms == pytest.approx(plain.num_terms)


@pytest.mark.parametrize("together", [1, 2])
def test_a_forward_without_gradient_keeps_the_order_of_the_rows(together):
    (batch,) = batches_of("sft", 6)

    def read(logps, part):
        labels = part["labels"][:, 1:] != -100
        each = torch.zeros(labels.shape).masked_scatter(labels, logps).sum(1)
        return each if together == 1 else each.view(-1, 2).sum(1).repeat_interleave(2)

    found = {}
    for budget in (None, BUDGET):
        engine = engine_of(tiny_llama())
        engine.options = replace(engine.options, tokens_per_batch=budget)
        found[budget] = engine.forward_only(batch, read, rows_together=together)
    assert_close(found[BUDGET], found[None], rtol=1e-5, atol=1e-5)
