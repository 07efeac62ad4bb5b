"""Surrogate losses of the policy: by hand, beside TRL's numbers, at ratio 1, and what they clip."""

import math

import pytest
import torch
from torch.testing import assert_close

from coati.models import surrogate_loss
from coati.models.policy_loss import LossAggregation, PolicyTokens, own_policy_terms
from coati.models.policy_registry import POLICY_LOSSES
from coati.models.surrogate_loss import (
    SurrogateSettings,
    surrogate_statistics,
    surrogate_terms,
)

NAN = math.nan
ALL = torch.ones(1, 3)
# Two responses, the first a token shorter.
LOGPS = [[-1.0, -0.5, -2.0, 0.0], [-0.3, -1.2, -0.7, -0.9]]
OLD = [[-1.2, -0.9, -1.5, 0.0], [-2.3, -1.1, -0.8, -0.9]]
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
ADVANTAGES = torch.tensor([1.5, -0.8])
# Of TRL 1.16's GRPOTrainer._compute_loss on these numbers: loss_type and importance_sampling_level,
# the loss, and its gradient with respect to the log-probs.
THEIRS = {
    "gspo": ("grpo, sequence", -0.0908114314, [[0.0] * 4, [0.1648721248] * 4]),
    "gspo, wide": (
        "grpo, sequence, epsilon .9",
        -0.1159328818,
        [[-0.2584737837] * 3 + [0.0], [0.1648721248] * 4],
    ),
    "cispo": (
        "cispo, epsilon_high 5",
        0.1947178096,
        [
            [-0.2617291808, -0.3196767271, -0.1299708635, 0.0],
            [0.5714285970, 0.1034099907, 0.1263052672, 0.1142857224],
        ],
    ),
    "sapo": (
        "sapo",
        -0.6256295443,
        [
            [-0.3016390502, -0.3512814641, -0.1459119767, 0.0],
            [0.0035984372, 0.0902582631, 0.1101808548, 0.1],
        ],
    ),
    "dual": (
        "grpo, delta 3",
        -0.1506318450,
        [[0.0, 0.0, -0.1516326666, 0.0], [0.0, 0.0904837400, 0.1105170995, 0.1]],
    ),
}
SETTINGS = {
    "gspo": SurrogateSettings("gspo", 3e-4, 4e-4),
    "gspo, wide": SurrogateSettings("gspo", 0.9, 0.9),
    "cispo": SurrogateSettings("cispo"),
    "sapo": SurrogateSettings("sapo"),
    "dual": SurrogateSettings("ppo", 0.2, 0.2, dual_clip=3.0),
}


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float32)


def terms(settings, logps, old, advantages, mask=None) -> torch.Tensor:
    mask = torch.ones_like(logps) if mask is None else mask
    return own_policy_terms(
        lambda tokens: surrogate_terms(tokens, settings), logps, old, advantages, mask
    )


@pytest.mark.parametrize("name", THEIRS)
def test_losses_and_gradients_are_those_of_trl(name):
    settings = SETTINGS[name]
    logps = torch.tensor(LOGPS).requires_grad_()
    advantages = ADVANTAGES[:, None].expand(2, 4)
    found = terms(settings, logps, torch.tensor(OLD), advantages, MASK)
    mode = POLICY_LOSSES[settings.name].loss_agg_mode or "seq-mean-token-mean"
    agg = LossAggregation(mode)
    loss = agg.total(found, MASK) / agg.num_terms(MASK)
    loss.backward()
    assert float(loss) == pytest.approx(THEIRS[name][1], rel=1e-5)
    assert_close(logps.grad, torch.tensor(THEIRS[name][2]), rtol=1e-5, atol=1e-7)


def test_gspo_by_hand():
    """s = exp(mean(log 2, log 8)) = 4 for both tokens, whatever each moved."""
    logps = row(2.0, 8.0).log()
    wide = SurrogateSettings("gspo", 0.5, 9.0)
    assert_close(terms(wide, logps, torch.zeros(1, 2), row(1, 1)), row(-4, -4))
    narrow = SurrogateSettings("gspo", 0.5, 0.25)
    assert_close(terms(narrow, logps, torch.zeros(1, 2), row(1, 1)), row(-1.25, -1.25))
    assert_close(terms(narrow, logps, torch.zeros(1, 2), row(-1, -1)), row(4, 4))


def test_gspo_token_has_the_values_of_gspo_and_each_tokens_own_gradient():
    logps = row(2.0, 8.0).log().requires_grad_()
    settings = SurrogateSettings("gspo-token", 0.5, 9.0)
    found = terms(settings, logps, torch.zeros(1, 2), row(1.0, 3.0))
    assert_close(found, row(-4, -12))
    found.sum().backward()
    assert_close(logps.grad, row(-4, -12))  # -s A_t at each token
    shared = row(2.0, 8.0).log().requires_grad_()
    terms(
        SurrogateSettings("gspo", 0.5, 9.0), shared, torch.zeros(1, 2), row(1.0, 3.0)
    ).sum().backward()
    assert_close(shared.grad, row(-8, -8))  # -s mean A, twice


def test_cispo_by_hand():
    """-min(r, 5) A log pi; a token beyond the cap keeps its gradient."""
    logps = row(math.log(0.5), math.log(0.25)).requires_grad_()
    old = logps.detach() - row(math.log(2), math.log(16))
    found = terms(SurrogateSettings("cispo"), logps, old, row(3, -2))
    assert_close(found, row(6 * math.log(2), -10 * math.log(4)))
    found.sum().backward()
    assert_close(logps.grad, row(-6, 10))


def test_sapo_by_hand():
    """(4 / tau) sigmoid(tau (r - 1)) A, tau 1 above, 1.05 below; at r = 1 it is 2 A / tau."""
    found = terms(SurrogateSettings("sapo"), row(0, math.log(2)), torch.zeros(1, 2), row(1, -1))
    gate = 1 / (1 + math.exp(-1.05))
    assert_close(found, row(-2, 4 / 1.05 * gate))
    other = SurrogateSettings("sapo", sapo_tau=(2.0, 1.0))
    found = terms(other, row(math.log(1.5)), torch.zeros(1, 1), row(1))
    assert_close(found, row(-2 / (1 + math.exp(-1))))


def test_dual_clip_bounds_the_loss_of_a_negative_advantage_alone():
    logps = row(10, 10, 2, 0.1).log().requires_grad_()
    settings = SurrogateSettings("ppo", 0.2, 0.2, dual_clip=3.0)
    found = terms(settings, logps, torch.zeros(1, 4), row(-1, 1, -1, -1))
    assert_close(found, row(3, -1.2, 2, 0.8))
    found.sum().backward()
    assert_close(logps.grad, row(0, 0, 2, 0))


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_at_ratio_1_the_gradient_is_that_of_reinforce(name):
    logps = row(-1.0, -2.0, -0.5).requires_grad_()
    advantages = row(1, 1, 1) if name == "gspo" else row(1, -1, 2)
    terms(SurrogateSettings(name), logps, logps.detach(), advantages).sum().backward()
    assert_close(logps.grad, -advantages)


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_masked_cells_change_nothing(name, bad):
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    torch.manual_seed(0)
    clean = [torch.randn(3, 3) * mask for _ in range(3)]
    dirty = [tensor.masked_fill(mask == 0, bad) for tensor in clean]

    def found(tensors):
        first = tensors[0].clone().requires_grad_()
        losses = terms(SurrogateSettings(name), first, *tensors[1:], mask)
        losses.sum().backward()
        tokens = PolicyTokens(first, *tensors[1:], mask)
        statistics = surrogate_statistics(tokens, SurrogateSettings(name))
        return losses.detach(), first.grad, [one.selected() for one in statistics.values()]

    assert_close(found(dirty), found(clean))
    assert not found(dirty)[1][mask == 0].any()


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_a_ratio_beyond_all_bounds_stays_finite(name):
    logps = row(0.0, -900.0, 0.0).requires_grad_()
    found = terms(SurrogateSettings(name), logps, row(-900.0, 0.0, -1.0), row(-1, 1, -1))
    found.sum().backward()
    assert found.isfinite().all() and logps.grad.isfinite().all()


def clipped(settings, ratios, advantages) -> list[float]:
    logps = torch.tensor([ratios]).log()
    tokens = PolicyTokens(
        logps, torch.zeros_like(logps), torch.tensor([advantages]), logps == logps
    )
    return surrogate_statistics(tokens, settings)["clip_fraction"].tolist()


def test_what_counts_as_clipped():
    both = [1.0, -1.0, 1.0, -1.0]
    ratios = [1.5, 1.5, 0.5, 0.5]
    assert clipped(SurrogateSettings(), ratios, both) == [1, 0, 0, 1]
    assert clipped(SurrogateSettings(dual_clip=1.4), ratios, both) == [1, 1, 0, 1]
    assert clipped(SurrogateSettings("gspo", 0.1, 0.1), [1.5, 1.0], [1.0, 1.0]) == [1, 1]
    assert clipped(SurrogateSettings("gspo", 0.1, 0.1), [2.0, 0.5], [1.0, 1.0]) == [0, 0]
    assert clipped(SurrogateSettings("cispo"), [4.9, 5.1], [-1.0, -1.0]) == [0, 1]
    # 4 g (1 - g) is a half where |r - 1| = log((1 + sqrt .5) / (1 - sqrt .5)) = 1.763
    assert clipped(SurrogateSettings("sapo"), [2.7, 2.8, 0.01], [1.0] * 3) == [0, 1, 0]


def test_statistics():
    logps, old = row(0.5, 1.5, 1.5, 9.0).log(), row(1, 1, 1, 1).log() - 0.25
    mask = torch.tensor([[1, 1, 1, 0]])
    tokens = PolicyTokens(logps - 0.25, old, row(-1, -1, 1, NAN), mask)
    statistics = surrogate_statistics(tokens, SurrogateSettings())
    # the second is the side that is never clipped
    assert statistics["clip_fraction"].tolist() == [1, 0, 1]
    assert_close(statistics["sampled_entropy"].selected(), torch.tensor([0.25] * 3))
    assert_close(statistics["ratio_max"].selected(), torch.tensor([1.5]))
    x = torch.tensor([0.5, 1.5, 1.5])  # pi / pi_old = e^r; KL(old || new) by k3: e^r - 1 - r
    assert_close(statistics["update_kl"].selected(), x - 1 - x.log())


def test_statistics_of_no_action_are_no_samples():
    tokens = PolicyTokens(ALL, ALL, ALL, torch.zeros(1, 3))
    nothing = surrogate_statistics(tokens, SurrogateSettings())
    assert [len(samples.selected()) for samples in nothing.values()] == [0] * len(nothing)


def test_statistics_hold_no_graph():
    tokens = PolicyTokens(ALL.clone().requires_grad_(), ALL, ALL, ALL)
    for name in POLICY_LOSSES:
        found = surrogate_statistics(tokens, SurrogateSettings(name))
        assert not any(samples.selected().requires_grad for samples in found.values())


def test_every_row_of_the_table_has_its_function():
    assert surrogate_loss._LOSSES.keys() == POLICY_LOSSES.keys()
    with pytest.raises(ValueError, match="unknown policy loss 'gspo2'; there are ppo, gspo"):
        SurrogateSettings("gspo2")
