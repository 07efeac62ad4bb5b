"""The ILQL trainer: its step against plain PyTorch, rewards, targets, and what it refuses."""

import copy

import pytest
import torch

from coati.dataset import DataCollatorForScoredDataset
from coati.dataset.load.loader import GlobalBatchLoader
from coati.models.ilql_heads import attach
from coati.models.ilql_loss import ILQLLoss
from coati.parallel import ParallelOptions
from coati.parallel.boost import boost
from coati.recipes.data_checks import reward_moments
from coati.trainer import ILQLTrainer
from coati.trainer.ilql import ILQLObjective
from tests.experience_maker.engines import group_of_one
from tests.models.test_ilql import plain_heads
from tests.tiny import tiny_llama, tiny_tokenizer

LOSS = ILQLLoss(tau=0.8, gamma=0.9, cql_coef=0.3, awac_coef=0.7, awac_beta=0.5)
# Two turns of actions in the first row; the second has none before its end.
ROWS = [
    {
        "input_ids": [5, 9, 8, 11, 30, 31, 12, 13],
        "loss_mask": [False, False, True, True, False, False, True, True],
        "reward": 3.0,
    },
    {"input_ids": [7, 6, 2], "loss_mask": [False, False, True], "reward": -1.0},
    {"input_ids": [7, 6, 4, 2], "loss_mask": [False, False, True, True], "reward": 1.0},
    {"input_ids": [3, 6, 40, 2], "loss_mask": [False, True, True, True], "reward": 2.0},
]


class Rows(list):
    column_names = ("input_ids", "loss_mask", "reward")

    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    with group_of_one(tmp_path_factory.mktemp("group")):
        yield


def trainer_of(lr: float = 1e-2, **keywords) -> ILQLTrainer:
    model = tiny_llama()
    heads = attach(model, seed=3)
    with torch.no_grad():  # targets that are not the heads
        for parameter in heads.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.manual_seed(0)))
    options = ParallelOptions(plugin="ddp", precision="fp32")
    engine = boost(model, options, lr=lr, weight_decay=0.0, total_steps=100, warmup_steps=0)
    mean, std = reward_moments(Rows(ROWS))
    return ILQLTrainer(engine=engine, loss=LOSS, mean=mean, std=std, **keywords)


def by_hand(model, heads) -> torch.Tensor:
    """The loss of ROWS, row by row and action by action, as the paper's equations have it."""
    rewards = torch.tensor([row["reward"] for row in ROWS])
    standard = (rewards - rewards.mean()) / rewards.std(unbiased=False)
    terms = []
    for row, reward in zip(ROWS, standard.tolist(), strict=True):
        ids = torch.tensor([row["input_ids"]])
        places = [k - 1 for k, action in enumerate(row["loss_mask"]) if action]
        states = model.model(input_ids=ids)[0][0, places]
        actions = ids[0, [k + 1 for k in places]]
        logps = model.lm_head(states).log_softmax(-1)
        values = plain_heads(heads, states, actions)
        for t in range(len(places)):
            ends = t + 1 == len(places)
            following = 0.0 if ends else float(values.v[t + 1].detach())
            wanted = (reward if ends else 0.0) + LOSS.gamma * following
            loss_q = (values.q1[t] - wanted) ** 2 + (values.q2[t] - wanted) ** 2
            gap = values.target[t] - values.v[t]
            loss_v = (LOSS.tau if gap >= 0 else 1 - LOSS.tau) * gap**2
            cql = -(values.q1_logps[t] + values.q2_logps[t])
            weight = float(torch.exp(LOSS.awac_beta * gap.detach()))
            awac = -weight * logps[t, actions[t]]
            terms.append(loss_q + loss_v + LOSS.cql_coef * cql + LOSS.awac_coef * awac)
    return torch.stack(terms).mean()


def test_a_step_is_that_of_the_equations():
    """Loss, and weights after one step of AdamW, of the backbone and of every head."""
    trainer = trainer_of()
    plain = copy.deepcopy(trainer.engine.module)
    plain.lm_head.__dict__.pop("forward", None)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    loss = by_hand(plain, plain.ilql_heads)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    optimizer.step()
    batch = DataCollatorForScoredDataset(tiny_tokenizer(), 16)(ROWS)
    step = trainer.engine.train_step([batch], trainer.objective)
    assert step.loss == pytest.approx(float(loss), rel=1e-5) and step.num_terms == 10
    ours = dict(trainer.engine.module.named_parameters())
    for name, parameter in plain.named_parameters():
        # AdamW's first step is the sign of a gradient: what is 0 but for rounding may go anywhere.
        sure = parameter.grad.abs() > 1e-6
        torch.testing.assert_close(ours[name][sure], parameter[sure], atol=2e-4, rtol=1e-3)
    assert {"ilql_heads.q1.2.weight", "ilql_heads.v.0.bias"} <= set(ours)


def test_the_cut_into_micro_batches_changes_nothing():
    collate = DataCollatorForScoredDataset(tiny_tokenizer(), 16)
    found = []
    for cut in ([ROWS], [ROWS[:1], ROWS[1:]], [[row] for row in ROWS]):
        trainer = trainer_of()
        step = trainer.engine.train_step([collate(rows) for rows in cut], trainer.objective)
        found.append((step.loss, step.num_terms, step.grad_norm))
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[2] == pytest.approx(found[0], rel=1e-4)


def test_targets_follow_every_so_many_steps(tmp_path):
    """Every 2 of 5 steps: twice alpha of the way to where the heads then are."""
    trainer = trainer_of(alpha=0.25, sync_every=2, max_epochs=5, save_dir=str(tmp_path))
    heads = trainer.heads
    before = heads.targets["q1.2.bias"].clone()
    online = []

    class Watch:
        def on_step(self, trainer, metrics):
            online.append(heads.q1[2].bias.detach().clone())

    trainer.callbacks.callbacks.append(_callback(Watch))
    collate = DataCollatorForScoredDataset(tiny_tokenizer(), 16)
    trainer.fit(GlobalBatchLoader(Rows(ROWS), collate, batch_size=4))
    assert len(online) == 5
    wanted = before
    for step in (2, 4):
        wanted = 0.25 * online[step - 1] + 0.75 * wanted
    torch.testing.assert_close(heads.targets["q1.2.bias"], wanted)


def _callback(kind):
    from coati import Callback

    return type(kind.__name__, (kind, Callback), {})()


def test_without_a_loss_mask_every_token_but_the_first_is_an_action():
    batch = DataCollatorForScoredDataset(tiny_tokenizer(), 16)(ROWS)
    objective = ILQLObjective(apply_loss_mask=False)
    assert int(objective.num_terms(objective.prepare(batch))) == 7 + 2 + 3 + 3
    objective = ILQLObjective(mean=1.0, std=2.0)
    assert objective.prepare(batch)["reward"].tolist() == [1.0, -1.0, 0.0, 0.5]


def test_moments_of_the_rewards(capsys):
    assert reward_moments({"reward": [1.0, 3.0]}) == (2.0, 1.0)
    assert reward_moments({"reward": [5.0, 5.0]}) == (5.0, 1.0)
    assert "all 2 rows of --dataset have the score 5" in capsys.readouterr().err


def test_a_model_without_heads_is_refused():
    options = ParallelOptions(plugin="ddp", precision="fp32")
    with pytest.raises(ValueError, match="ILQL needs its heads"):
        ILQLTrainer(engine=boost(tiny_llama(), options))
