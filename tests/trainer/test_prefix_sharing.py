"""Every method has the same loss and gradient whether the rows of a prompt share it or not, and
gives the model fewer tokens where they do."""

import copy
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from coati.dataset.load.collator import DataCollatorForKTODataset, DataCollatorForPreferenceDataset
from coati.experience_maker.model_inputs import action_logprobs, scores, state_values
from coati.models.critic import Critic
from coati.models.policy_loss import LossAggregation
from coati.models.reward_model import RewardModel
from coati.parallel.inference_model import InferenceModel
from coati.trainer import RewardModelTrainer
from coati.trainer.policy_objective import PolicyObjective, PolicySettings, ValueObjective
from tests.experience_maker.engines import engine_of, group_of_one
from tests.experience_maker.test_experience import experience
from tests.parallel.preference_cases import Rows
from tests.tiny import tiny_llama
from tests.trainer.test_learning import METHODS, TOKENIZER, VOCAB, judged

PROMPTS = [[3 + (i * i + j) % 15 for j in range(20 + i)] for i in (0, 1, 3)]
GROUPS = [[[14, 15], [2, 3, 4, 5]], [[3], [4, 5, 6]], [[7, 8], [7, 9, 1]]]
ONCE = sum(map(len, PROMPTS))


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    with group_of_one(tmp_path_factory.mktemp("group")):
        yield


@contextmanager
def counted(model):
    """The tokens of each call of ``model``."""
    seen: list[int] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].numel())
    )
    yield seen
    hook.remove()


def pairs() -> Rows:
    rows = Rows()
    for prompt, answers in zip(PROMPTS, GROUPS, strict=True):
        row = {}
        for side, answer in zip(("chosen", "rejected"), answers, strict=True):
            row[f"{side}_input_ids"] = prompt + answer
            row[f"{side}_loss_mask"] = [False] * len(prompt) + [True] * len(answer)
        # The last token of a prompt is supervised on one side alone.
        row["chosen_loss_mask"][len(prompt) - 1] = True
        rows.append(row | {"seq_length": len(prompt) + max(map(len, answers))})
    return rows


def both_steps(engine, objective, window) -> list[tuple]:
    """Loss, gradient and the tokens that the model saw, with and without sharing."""
    found = []
    for share in (True, False):
        engine.share_prefixes = share
        engine.optimizer.zero_grad()
        with counted(engine.module) as seen:
            step = engine.train_step(window, objective)
        found.append((step.loss, engine.optimizer.found, seen))
    return found


def assert_equal_and_cheaper(shared: tuple, alone: tuple) -> None:
    assert shared[0] == pytest.approx(alone[0], rel=1e-5)
    assert_close(shared[1], alone[1], rtol=1e-4, atol=1e-6 * float(alone[1].abs().max()))
    assert len(shared[2]) == len(alone[2])
    assert shared[2][-1] == alone[2][-1] - ONCE - 1  # and 7, which two answers begin with


@pytest.mark.parametrize("method", METHODS)
def test_preferences(method):
    kind, options = METHODS[method]
    model = tiny_llama(0, layers=2, hidden=32, vocab_size=VOCAB)
    if kind is RewardModelTrainer:
        model = RewardModel(backbone=model)
    if method in ("dpo", "kto"):
        options = options | {"ref_model": copy.deepcopy(tiny_llama(1, hidden=32, vocab_size=VOCAB))}
    engine = engine_of(model, packed=True)
    trainer = kind(engine=engine, **options)
    if method == "kto":
        rows = judged(pairs())
        batch = DataCollatorForKTODataset(TOKENIZER, 64)(rows)
    else:
        batch = DataCollatorForPreferenceDataset(TOKENIZER, 64)(pairs())
    assert_equal_and_cheaper(*both_steps(engine, trainer.objective, [batch]))


def group_rows():
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    answers = [answer for answers in GROUPS for answer in answers]
    made = experience(prompts, answers, left=2, right=1)
    numbers = torch.sin(made.advantages) * made.action_mask
    return replace(
        made,
        action_log_probs=numbers - 3.0,
        reference_log_probs=numbers - 3.1,
        advantages=numbers,
        values=numbers,
        returns=-numbers,
    )


def test_policy_gradient():
    settings = PolicySettings(
        loss_agg=LossAggregation("seq-mean-token-mean", 8), kl_coef=0.1, entropy_coef=0.01
    )
    objective = PolicyObjective(settings, lambda sums: sums)
    engine = engine_of(tiny_llama(), packed=True)
    window = objective.batches([group_rows()])
    assert_equal_and_cheaper(*both_steps(engine, objective, window))


@pytest.mark.parametrize("trained", [True, False])
def test_flops_are_of_the_tokens_that_go_through_the_model(trained):
    objective = PolicyObjective(PolicySettings(), lambda sums: sums)
    engine = engine_of(tiny_llama(), packed=True)
    window = objective.batches([group_rows()])
    found = []
    for share in (True, False):
        engine.share_prefixes = share
        if trained:
            engine.train_step(window, objective)
        else:
            engine.forward_only(window[0], lambda logps, batch: logps)
        found.append(float(engine.work.take()))
    cost = engine.work.training if trained else engine.work.forward
    # A prompt less of each group, and the 7 after the last of them, which sees that prompt.
    pairs = sum(len(prompt) * (len(prompt) + 1) / 2 for prompt in PROMPTS) + len(PROMPTS[-1]) + 1
    assert found[1] - found[0] == cost.of(ONCE + 1, 0, pairs)


def test_values():
    torch.manual_seed(0)
    critic = Critic(backbone=tiny_llama())
    torch.nn.init.normal_(critic.score.weight, std=0.1)
    objective = ValueObjective()
    window = objective.batches([group_rows()])
    assert_equal_and_cheaper(*both_steps(engine_of(critic, packed=True), objective, window))


@pytest.mark.parametrize(
    ("kind", "read"), [(None, action_logprobs), (Critic, state_values), (RewardModel, scores)]
)
def test_scoring(kind, read):
    torch.manual_seed(0)
    model = tiny_llama() if kind is None else kind(backbone=tiny_llama())
    if kind is not None:
        torch.nn.init.normal_(model.score.weight, std=0.1)
    engine = engine_of(model, packed=True)
    found = []
    for share in (True, False):
        engine.share_prefixes = share
        with counted(model) as seen:
            found.append((read(InferenceModel(engine), group_rows(), 2), seen))
    (shared, few), (alone, many) = found
    assert_close(shared, alone, rtol=1e-5, atol=1e-5)
    assert sum(few) == sum(many) - ONCE - 1 and len(few) == len(many) == 3
