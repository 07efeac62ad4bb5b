"""Every preference trainer learns a set that can be told apart, and so gets pairs right that it has
not seen.

Better answers are made of one half of the symbols, worse ones of the other half. In one process,
with plain PyTorch in the plugin's place.
"""

import copy
from types import SimpleNamespace

import pytest
import torch

from coati.dataset.load.collator import DataCollatorForKTODataset, DataCollatorForPreferenceDataset
from coati.dataset.load.loader import EvaluationLoader, GlobalBatchLoader
from coati.models.padding_free import PaddingFree
from coati.models.reward_model import RewardModel
from coati.parallel.engine import Engine
from coati.trainer import DPOTrainer, KTOTrainer, ORPOTrainer, RewardModelTrainer, RunSchedule
from tests.parallel.preference_cases import Rows
from tests.tiny import tiny_llama

SYMBOLS, VOCAB = 16, 20  # better answers hold symbols 0 to 7, worse ones 8 to 15
TOKENIZER = SimpleNamespace(pad_token_id=0, eos_token_id=0, padding_side="right")
BATCH, STEPS, UNSEEN = 16, 20, 100
SEEDS = 5
LR = 1e-2
METHODS = {
    "rm": (RewardModelTrainer, {}),
    "dpo": (DPOTrainer, {}),
    "simpo": (DPOTrainer, {"loss_type": "simpo_loss"}),
    "mpo": (
        DPOTrainer,
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    ),
    "orpo": (ORPOTrainer, {"lam": 1.0}),
    "kto": (KTOTrainer, {}),
}


class PlainBooster:
    """In a booster's place: one process, nothing wrapped."""

    plugin = SimpleNamespace(support_no_sync=lambda: False)

    def backward(self, loss, optimizer) -> None:
        loss.backward()


class Clipped(torch.optim.Adam):
    """Adam that clips to norm 1 and knows the norm, as boosted optimizers do."""

    def step(self, closure=None):
        (group,) = self.param_groups
        self.norm = torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        return super().step(closure)

    def get_grad_norm(self) -> float:
        return float(self.norm)


def pairs(count: int, seed: int) -> Rows:
    """Prompts of any symbols; answers of 2 to 5, the better one from the lower half."""
    generator, rows = torch.Generator().manual_seed(seed), Rows()

    def some(low: int, high: int, least: int, most: int) -> list[int]:
        length = int(torch.randint(least, most + 1, (), generator=generator))
        return torch.randint(low, high, (length,), generator=generator).tolist()

    for _ in range(count):
        prompt, row = some(0, SYMBOLS, 2, 5), {}
        for side, low in (("chosen", 0), ("rejected", SYMBOLS // 2)):
            answer = some(low, low + SYMBOLS // 2, 2, 5)
            row[f"{side}_input_ids"] = prompt + answer
            row[f"{side}_loss_mask"] = [False] * len(prompt) + [True] * len(answer)
        rows.append(
            row | {"seq_length": max(len(row["chosen_input_ids"]), len(row["rejected_input_ids"]))}
        )
    return rows


def judged(rows: Rows) -> Rows:
    """Both answers of every pair, one by one."""
    found = Rows()
    for row in rows:
        for side in ("chosen", "rejected"):
            ids, start = row[f"{side}_input_ids"], row[f"{side}_loss_mask"].index(True)
            found.append(
                {
                    "prompt": ids[:start],
                    "completion": ids[start:],
                    "label": side == "chosen",
                    "seq_length": len(ids),
                }
            )
    return found


@pytest.fixture(scope="module", autouse=True)
def group_of_one(tmp_path_factory):
    """Engines meet other processes even when there are none."""
    alone = not torch.distributed.is_initialized()
    if alone:
        store = tmp_path_factory.mktemp("store") / "file"
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=0, world_size=1
        )
    yield
    if alone:
        torch.distributed.destroy_process_group()


def loaders(method: str, seed: int):
    """What the method trains on, and unseen rows."""
    train, unseen = pairs(BATCH * STEPS, seed), pairs(UNSEEN, 1000 + seed)
    if method == "kto":
        collate = DataCollatorForKTODataset(TOKENIZER, 16)
        windows = GlobalBatchLoader(judged(train), collate, batch_size=BATCH, partners=True)
        return windows, EvaluationLoader(judged(unseen), collate, batch_size=UNSEEN, partners=True)
    collate = DataCollatorForPreferenceDataset(TOKENIZER, 16)
    return GlobalBatchLoader(train, collate, batch_size=BATCH), EvaluationLoader(
        unseen, collate, batch_size=UNSEEN
    )


def trained(method: str, seed: int, folder):
    """A trainer after its run from a model of random weights."""
    kind, options = METHODS[method]
    model = tiny_llama(seed, layers=1, hidden=32, vocab_size=VOCAB)
    if kind is RewardModelTrainer:
        model = RewardModel(backbone=model)
    if method in ("dpo", "kto"):
        options = options | {"ref_model": copy.deepcopy(model)}
    engine = Engine(PlainBooster(), model, Clipped(model.parameters(), lr=LR))
    schedule = RunSchedule(str(folder), max_steps=STEPS, eval_interval=0, log_interval=STEPS)
    trainer = kind(engine=engine, max_epochs=1, schedule=schedule, **options)
    trainer.fit(*loaders(method, seed))
    return trainer


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("method", METHODS)
def test_what_can_be_told_apart_is_told_apart(method, seed, tmp_path):
    trainer = trained(method, seed, tmp_path)
    name = getattr(trainer, "accuracy", "accuracy")
    before, after = (
        found[f"eval/{name}"] for found in (trainer.first_evaluation, trainer.last_evaluation)
    )
    assert before < 0.8 and after > 0.95
    assert trainer.last_evaluation["eval/loss"] < trainer.first_evaluation["eval/loss"]


@pytest.mark.parametrize("method", ["rm", "dpo"])
def test_pairs_are_laid_end_to_end(method, tmp_path):
    """On a CPU no padding goes through the model: it sees one row of all real tokens."""
    model = tiny_llama(0, layers=1, hidden=32, vocab_size=VOCAB)
    model = RewardModel(backbone=model) if method == "rm" else model
    engine = Engine(PlainBooster(), model, padding_free=PaddingFree.of(model))
    trainer = METHODS[method][0](engine=engine, save_dir=str(tmp_path))
    seen = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].shape)
    )
    ((batch,),) = list(loaders(method, 0)[0].global_batches(0))[:1]
    rows = trainer.objective.prepare(batch)
    engine.forward(rows)
    real = int(rows["attention_mask"].sum())
    assert seen == [(1, real)] and real < rows["input_ids"].numel()
