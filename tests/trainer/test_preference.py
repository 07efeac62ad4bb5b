"""What the preference trainers do with a batch and say about a run; hand-worked, with an engine
that only counts."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from coati.parallel.footprint.model_flops import PassFlops
from coati.parallel.objective import Step
from coati.parallel.plugins import ParallelOptions
from coati.parallel.step_work import PassWork, StepClock
from coati.parallel.weights import ModelAssets
from coati.trainer import DPOTrainer, ORPOTrainer, RewardModelTrainer
from coati.trainer.best_checkpoint import value_of
from coati.trainer.monitor.preference_diagnostics import EVERY, PATIENCE, PreferenceChecks, moments
from coati.trainer.monitor.reward_model_report import verdict
from coati.trainer.preference import RowLogps, deinterleave, interleave, pair_accuracy
from coati.trainer.schedule import is_better

LN2 = math.log(2)


class CountingEngine:
    lr_scheduler = None
    device = "cpu"
    plugin = None
    booster = None
    dtype = torch.float32
    mesh = SimpleNamespace(is_loss_rank=True)
    options = ParallelOptions()
    work = PassWork(PassFlops(2.0, 0.0, 0.0), PassFlops(6.0, 0.0, 0.0))
    clock = StepClock()


def trainer(kind=DPOTrainer, **keywords):
    return kind(engine=CountingEngine(), assets=ModelAssets(config=None), **keywords)


def batch(side="right", margin=True) -> dict[str, torch.Tensor]:
    """Pair 0: answers [7, 8] and [9]; pair 1 is blank. Prompt [5, 6]."""
    rows = {
        "chosen": ([[5, 6, 7, 8], [5, 6]], [[0, 0, 1, 1], [0, 0]]),
        "reject": ([[5, 6, 9], [5, 6]], [[0, 0, 1], [0, 0]]),
    }
    made = {"margin": torch.tensor([0.5, 0.0])} if margin else {}
    for name, (ids, masks) in rows.items():

        def padded(values, fill):
            blank = [[fill] * (4 - len(row)) for row in values]
            return torch.tensor(
                [b + r if side == "left" else r + b for r, b in zip(values, blank, strict=True)]
            )

        made[f"{name}_input_ids"] = padded(ids, 9)
        made[f"{name}_attention_mask"] = padded([[1] * len(row) for row in ids], 0)
        made[f"{name}_loss_mask"] = padded(masks, 0).bool()
    return made


def test_interleaved_rows_and_back():
    chosen, rejected = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[5], [6]])
    rows = interleave(chosen, rejected)
    assert rows.tolist() == [[1, 2], [5, 0], [3, 4], [6, 0]]
    evens, odds = deinterleave(torch.arange(4))
    assert evens.tolist() == [0, 2]
    assert odds.tolist() == [1, 3]


@pytest.mark.parametrize("side", ["right", "left"])
def test_prepared_rows(side):
    rows = trainer().objective.prepare(batch(side))
    assert rows["input_ids"][:2, :3].tolist() == [[5, 6, 7], [5, 6, 9]]
    assert rows["attention_mask"].tolist() == [
        [1, 1, 1, 1],
        [1, 1, 1, 0],
        [1, 1, 0, 0],
        [1, 1, 0, 0],
    ]
    assert rows["labels"].tolist() == [
        [-100, -100, 7, 8],
        [-100, -100, 9, -100],
        [-100] * 4,
        [-100] * 4,
    ]
    assert rows["counted"].tolist() == [True, True, False, False]
    assert rows["margin"].tolist() == [0.5, 0.5, 0.0, 0.0]
    assert trainer().objective.num_terms(rows) == 1


def test_without_the_loss_mask_every_real_token_counts_and_padding_never():
    rows = trainer(apply_loss_mask=False).objective.prepare(batch())
    assert rows["labels"].tolist()[:2] == [[5, 6, 7, 8], [5, 6, 9, -100]]


def logps(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def test_dpo_sums_masked_tokens_and_leaves_blank_pairs_out():
    """Chosen -1 - 2, rejected -4; reference -2 and -3: d = (-3 + 4) - (-2 + 3) = 0."""
    made = trainer().objective
    rows = made.prepare(batch()) | {"reference": torch.tensor([-2.0, -3.0, math.nan, math.nan])}
    loss, metrics = made.loss(logps(-1.0, -2.0, -4.0), rows)
    assert float(loss) == pytest.approx(LN2)
    assert metrics["chosen_rewards"].tolist() == pytest.approx([-0.1])
    assert metrics["rejected_rewards"].tolist() == pytest.approx([-0.1])
    assert metrics["accuracy"].tolist() == [0.5]
    assert metrics["lp_chosen"].tolist() == [-3.0] and metrics["lp_rejected"].tolist() == [-4.0]


def test_simpo_by_hand():
    """Means -1.5 and -4, beta 2, gamma 1.4: -log sigmoid(5 - 1.4)."""
    made = trainer(loss_type="simpo_loss").objective
    loss, _ = made.loss(logps(-1.0, -2.0, -4.0), made.prepare(batch()))
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-3.6)))


def test_ipo_averages_and_the_sft_term_adds_the_chosen_mean():
    """d of means = 2.5, reference 0: (2.5 - 5)^2, and .2 x 1.5."""
    made = trainer(loss_type="ipo_loss", sft_coef=0.2).objective
    rows = made.prepare(batch()) | {"reference": torch.zeros(4)}
    loss, _ = made.loss(logps(-1.0, -2.0, -4.0), rows)
    assert float(loss) == pytest.approx(6.25 + 0.3)


def test_a_sum_of_losses_by_hand():
    """c = -3 + 2 = -1, r = -4 + 3 = -1: .8 ln 2 + .2 (softplus(.1) + softplus(-.1)) + 1.5; averages
    are not the first loss's, whose rewards are logged."""
    made = trainer(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]).objective
    rows = made.prepare(batch()) | {"reference": torch.tensor([-2.0, -3.0, math.nan, math.nan])}
    loss, metrics = made.loss(logps(-1.0, -2.0, -4.0), rows)
    bco = math.log1p(math.exp(0.1)) + math.log1p(math.exp(-0.1))
    assert float(loss) == pytest.approx(0.8 * LN2 + 0.2 * bco + 1.5)
    assert metrics["chosen_rewards"].tolist() == pytest.approx([-0.1])


def test_orpo_by_hand():
    made = trainer(ORPOTrainer, lam=0.5).objective
    loss, metrics = made.loss(logps(-1.0, -2.0, -4.0), made.prepare(batch()))
    odds = [p - math.log(1 - math.exp(p)) for p in (-1.5, -4.0)]
    expected = 1.5 + 0.5 * math.log(1 + math.exp(-(odds[0] - odds[1])))
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert metrics["log_odds_ratio"].tolist() == pytest.approx([odds[0] - odds[1]])


def test_reward_model_by_hand():
    """Scores 1 and .2, margin .5: softplus(-.3) + .1 x 1.44; the blank pair's NaN never counts."""
    made = trainer(RewardModelTrainer, loss_fn="log_exp", center_coef=0.1).objective
    rows = made.prepare(batch())
    assert "labels" not in rows
    loss, metrics = made.loss(torch.tensor([1.0, 0.2, math.nan, math.nan]), rows)
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-0.3)) + 0.144)
    assert metrics["acc"].tolist() == [1.0] and metrics["dist"].tolist() == pytest.approx([0.8])


def test_row_logps_of_length_desensitized_pairs():
    tokens, mask = torch.tensor([[-1.0, -2.0], [-4.0, 0.0]]), torch.tensor([[1, 1], [1, 0]])
    assert RowLogps(ld_alpha=0.5)(tokens, mask).tolist() == [-2.0, -4.0]
    assert RowLogps()(tokens, mask).tolist() == [-3.0, -4.0]


def test_a_tie_counts_half():
    assert pair_accuracy(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([1.0, 1.0, 1.0])).tolist() == [
        0.5,
        1.0,
        0.0,
    ]


def test_evaluations_say_how_sure_they_are():
    step = Step(
        0.5, 10, metrics={"accuracy": [torch.ones(5), torch.cat([torch.ones(3), torch.zeros(2)])]}
    )
    found = trainer().evaluation_metrics(step)
    assert found["count"] == 10
    assert (found["accuracy_low"], found["accuracy_high"]) == pytest.approx(
        (0.4902, 0.9433), abs=1e-4
    )


@pytest.mark.parametrize(
    "loss, keywords, said",
    [
        (0.7, {}, "stored reference log-probs"),
        (LN2, {}, None),
        (25.0, {"loss_type": "ipo_loss"}, None),
        (24.0, {"loss_type": "ipo_loss"}, "25.0000"),
        (1.0, {"loss_type": "hinge_loss"}, None),
        (0.7, {"gamma": 0.5}, None),
        (0.7, {"sft_coef": 0.5}, None),
        (0.7, {"loss_type": "simpo_loss"}, None),
    ],
)
def test_the_first_loss_is_checked(loss, keywords, said):
    made = trainer(starts_at_reference=True, **keywords)
    made.state.step = 1
    lines = made.diagnose(Step(loss, 4))
    assert (lines == []) if said is None else (said in lines[0])


# Signs


def watch(
    steps: int, loss=0.5, right=0.9, lp=lambda step: (-10.0, -20.0), slope=0.0, pairs=8, ln2=True
) -> list[str]:
    """What is said about ``steps`` steps of ``pairs`` pairs."""
    signs, said, generator = PreferenceChecks(ln2), [], torch.Generator().manual_seed(0)
    for step in range(steps):
        length = torch.randint(1, 100, (pairs,), generator=generator).float()
        noise = torch.randn(pairs, generator=generator)
        metrics = {
            "accuracy": [(torch.rand(pairs, generator=generator) < right).float()],
            "lp_chosen": [torch.full((pairs,), lp(step)[0])],
            "lp_rejected": [torch.full((pairs,), lp(step)[1])],
            **{name: [values] for name, values in moments(noise + slope * length, length).items()},
        }
        signs.add(metrics, loss, pairs, is_loss_rank=True)
        said += signs.check()
    return said


def test_a_healthy_run_says_nothing():
    assert watch(4 * PATIENCE) == []


def test_loss_at_ln_2_is_said_once_and_only_where_it_means_chance():
    said = watch(4 * PATIENCE, loss=LN2)
    assert len(said) == 1 and "still ln 2" in said[0] and "--lr" in said[0]
    assert watch(PATIENCE - EVERY, loss=LN2) == []
    assert watch(4 * PATIENCE, loss=LN2, ln2=False) == []


def test_accuracy_at_chance_is_said():
    (said,) = watch(2 * PATIENCE, right=0.5)
    assert "chance" in said and "400 pairs" in said


def test_both_log_probs_falling_is_said():
    (said,) = watch(2 * PATIENCE, lp=lambda step: (-10.0 - step, -20.0 - step))
    assert "both fall" in said
    assert watch(2 * PATIENCE, lp=lambda step: (-10.0, -20.0 - step)) == []


def test_length_bias_is_said_with_its_direction():
    (said,) = watch(2 * PATIENCE, slope=0.1)
    assert "longer responses" in said
    (said,) = watch(2 * PATIENCE, slope=-0.1)
    assert "shorter responses" in said


def test_nothing_supervised_is_said_at_once():
    (said,) = watch(1, pairs=0, loss=0.0)
    assert "nothing in these steps is supervised" in said


# Verdict and best


def scores(right: int, count: int, apart: float) -> tuple[torch.Tensor, torch.Tensor]:
    chosen = torch.full((count,), apart / 2)
    return chosen, torch.where(torch.arange(count) < right, -chosen, 3 * chosen)


def test_a_good_reward_model():
    lines = verdict(*scores(90, 100, 2.0))
    assert len(lines) == 3
    assert (
        "PPO can start" in lines[0]
        and "0.900 on 100 pairs" in lines[0]
        and "above 0.6 beyond doubt" in lines[0]
    )
    assert "chosen responses score 1.000" in lines[1] and "+" in lines[1]
    assert lines[2].startswith("100% of the chosen scores are positive, 90% of the rejected")


@pytest.mark.parametrize("right, count", [(7, 10), (52, 100), (300, 1000), (58, 100)])
def test_doubtful_reward_models(right, count):
    assert "should not start" in verdict(*scores(right, count, 2.0))[0]


def test_standard_deviations_by_hand():
    """Scores 2, 0 and 1, -1: means 1 and 0, spread of the four sqrt(5/3)."""
    line = verdict(torch.tensor([2.0, 0.0]), torch.tensor([1.0, -1.0]))[1]
    assert f"{1 / math.sqrt(5 / 3):+.2f} standard deviations" in line


def test_best_by_metric():
    assert is_better("loss", 1.0, 2.0) and not is_better("eval/loss", 2.0, 1.0)
    assert is_better("accuracy", 0.6, 0.5) and not is_better("accuracy", math.nan, None)
    assert is_better("margin", -1.0, None)
    assert (
        value_of("accuracy", {"eval/accuracy": 0.5})
        == value_of("eval/accuracy", {"eval/accuracy": 0.5})
        == 0.5
    )
    with pytest.raises(
        ValueError, match=r"--metric_for_best acc: evaluations of this run give loss, accuracy"
    ):
        value_of("acc", {"eval/loss": 1.0, "eval/accuracy": 0.5})


def test_rewards_and_lengths_give_their_correlation():
    found = moments(torch.tensor([1.0, 2.0]), torch.tensor([3, 5]))
    assert_close(found["_xy"], torch.tensor([3.0, 10.0]))
    assert all(name.startswith("_") for name in found)
