"""Every pairwise loss by hand-worked values, and sums of them."""

import math

import pytest
import torch
from torch.testing import assert_close

from coati.models import pairwise_loss as module
from coati.models.loss_registry import (
    ALIASES,
    LOSS_TYPES,
    PairwiseSettings,
    needs_reference,
    pairwise_names,
)
from coati.models.pairwise_loss import DpoLoss, Pair, PairwiseObjective, pairwise_loss

LN2 = math.log(2)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def ls(x: float) -> float:
    return -math.log1p(math.exp(-x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def pair_of(c, r=None, tokens=(1.0, 1.0)) -> Pair:
    """Log-ratios c and r (numbers or tensors) over a reference of log-prob 0."""
    c = torch.as_tensor(c, dtype=torch.float32).reshape(-1)
    r = torch.zeros_like(c) if r is None else torch.as_tensor(r, dtype=torch.float32).reshape(-1)
    zero = torch.zeros_like(c)
    return Pair(c, r, zero, zero, zero + tokens[0], zero + tokens[1])


def test_dpo_at_the_reference_is_log_two():
    zero = torch.zeros(3)
    assert_close(DpoLoss(beta=0.1)(zero, zero, zero, zero)[0], tensor(LN2, LN2, LN2))


def test_dpo_by_hand():
    """Differences 0, 10 and 20: beta d = 0, 1, 2."""
    chosen, rejected = tensor(-0.5, -10.0, -1.0), tensor(-0.1, -30.0, -21.0)
    ref_chosen, ref_rejected = tensor(-0.5, -10.1, -0.1), tensor(-0.1, -20.1, -0.1)
    values, good, bad = DpoLoss(0.1)(chosen, rejected, ref_chosen, ref_rejected)
    assert_close(values, tensor(0.693147, 0.313262, 0.126928), atol=1e-6, rtol=0)
    assert_close(good, tensor(0.0, 0.01, -0.09), atol=1e-6, rtol=0)
    assert_close(bad, tensor(0.0, -0.99, -2.09), atol=1e-6, rtol=0)


def test_four_pairs_with_and_without_smoothing():
    """d = 2 - .4 = 1.6 and 1 - .4 = .6; smoothed by .1: dpo + .1 beta d."""
    one = torch.ones(4)
    pair = Pair(
        tensor(-3.0, -2.5, -4.0, -1.5),
        tensor(-5.0, -3.5, -6.0, -2.5),
        tensor(-2.8, -2.3, -3.8, -1.4),
        tensor(-3.2, -2.7, -4.2, -1.8),
        one,
        one,
    )
    plain = pairwise_loss("dpo_loss")(pair, PairwiseSettings(0.1))
    smoothed = pairwise_loss("dpo_loss")(pair, PairwiseSettings(0.1, label_smoothing=0.1))
    assert_close(plain, tensor(0.616344, 0.663597, 0.616344, 0.663597), atol=1e-6, rtol=0)
    assert_close(smoothed, tensor(0.632344, 0.669597, 0.632344, 0.669597), atol=1e-6, rtol=0)


def test_log_ratios_of_a_pair_and_their_averages_by_hand():
    """-6 - -2 = -4 over 4 tokens, -9 - -3 = -6 over 3; a response without tokens stays finite."""
    pair = Pair(*map(tensor, (-6.0, -9.0, -2.0, -3.0)), torch.tensor([4]), torch.tensor([3]))
    assert (pair.c.tolist(), pair.r.tolist(), pair.d.tolist()) == ([-4.0], [-6.0], [2.0])
    averaged = pair.averaged()
    assert (averaged.c.tolist(), averaged.r.tolist()) == ([-1.0], [-2.0])
    assert pair.without_reference().d.tolist() == [3.0]
    blank = torch.zeros(1)
    assert Pair(blank, blank, blank, blank, blank, blank).averaged().d.tolist() == [0.0]


# name, (c, r), settings, expected: each worked with the formula's own arithmetic
BY_HAND = [
    ("dpo_loss", (4.0, 0.0), PairwiseSettings(0.5, gamma=1.0), -ls(1.0)),
    ("dpo_loss", (1.0, -3.0), PairwiseSettings(0.5, gamma=1.0), -ls(1.0)),
    ("sigmoid_norm", (1.0, -3.0), PairwiseSettings(0.5), -ls(2.0)),
    ("simpo_loss", (0.5, 0.0), PairwiseSettings(2.0, gamma=1.4), math.log(1 + math.exp(0.4))),
    ("ipo_loss", (3.0, 0.0), PairwiseSettings(0.1), 4.0),  # (3 - 5)^2
    ("ipo_loss", (0.0, 0.0), PairwiseSettings(0.1), 25.0),  # 1 / (4 beta^2)
    ("ipo_loss", (7.0, 0.0), PairwiseSettings(0.1), 4.0),  # past its optimum
    ("hinge_loss", (4.0, 0.0), PairwiseSettings(0.1), 0.6),
    ("hinge_loss", (11.0, 0.0), PairwiseSettings(0.1), 0.0),
    ("hinge_loss", (-10.0, 0.0), PairwiseSettings(0.1), 2.0),
    # beta d = 1: dpo(d) = .313262, dpo(-d) = 1.313262; (.313262 x .8 - 1.313262 x .2) / .6
    (
        "robust",
        (10.0, 0.0),
        PairwiseSettings(0.1, label_smoothing=0.2),
        (0.3132617 * 0.8 - 1.3132617 * 0.2) / 0.6,
    ),
    # beta c = 2, beta r = -1
    ("apo_zero", (4.0, -2.0), PairwiseSettings(0.5), (1 - 0.8807971) + 0.2689414),
    ("apo_down", (4.0, -2.0), PairwiseSettings(0.5), 0.8807971 + (1 - 0.9525741)),
    ("sppo_hard", (4.0, -2.0), PairwiseSettings(0.5), 9.0 + 1.0),  # (4 - 1)^2 + (-2 + 1)^2
    ("nca_pair", (4.0, -2.0), PairwiseSettings(0.5), 0.126928 + 2.126928 / 2 + 0.3132617 / 2),
    ("bco_pair", (4.0, -2.0), PairwiseSettings(0.5), 0.126928 + 0.3132617),
    ("bco_pair", (-2.0, 4.0), PairwiseSettings(0.5), 1.3132617 + 2.126928),
    # x = .05: m = sigmoid(1) = .7310586
    (
        "discopop",
        (0.25, -0.25),
        PairwiseSettings(0.1),
        (1 - 0.7310586) * -ls(0.05) + 0.7310586 * math.exp(-0.05),
    ),
    # q = sigmoid(1) = .7310586
    (
        "exo_pair",
        (1.0, -1.0),
        PairwiseSettings(0.5, label_smoothing=0.1),
        0.7310586 * (ls(1.0) - math.log(0.9)) + 0.2689414 * (ls(-1.0) - math.log(0.1)),
    ),
]


@pytest.mark.parametrize("name, ratios, settings, expected", BY_HAND)
def test_pairwise_losses_by_hand(name, ratios, settings, expected):
    found = pairwise_loss(name)(pair_of(*ratios), settings)
    assert found.shape == (1,) and found.item() == pytest.approx(expected, abs=1e-6)


def test_every_loss_is_worked_by_hand():
    assert {name for name, *_ in BY_HAND} == set(LOSS_TYPES) == set(module._FUNCTIONS)


# beta, label smoothing -> loss of a pair whose policy is its reference
AT_REFERENCE = {
    "dpo_loss": lambda beta, e: LN2,
    "robust": lambda beta, e: LN2,
    "sigmoid_norm": lambda beta, e: LN2,
    "ipo_loss": lambda beta, e: 1 / (4 * beta**2),
    "hinge_loss": lambda beta, e: 1.0,
    "simpo_loss": lambda beta, e: None,
    "apo_zero": lambda beta, e: 1.0,
    "apo_down": lambda beta, e: 1.0,
    "sppo_hard": lambda beta, e: 1 / (2 * beta**2),
    "nca_pair": lambda beta, e: 2 * LN2,
    "bco_pair": lambda beta, e: 2 * LN2,
    "discopop": lambda beta, e: (LN2 + 1) / 2,
    "exo_pair": lambda beta, e: -LN2 - math.log(e * (1 - e)) / 2,
}


@pytest.mark.parametrize("name", LOSS_TYPES)
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_loss_of_a_policy_that_is_its_reference(name, beta):
    found = PairwiseObjective.of(name, beta=beta, label_smoothing=0.2).at_reference()
    expected = AT_REFERENCE[name](beta, 0.2)
    assert found is None if expected is None else found == pytest.approx(expected, rel=1e-6)


# A larger d may cost more where a loss has an optimum, or reads c and r apart.
MONOTONE = ("dpo_loss", "robust", "hinge_loss", "simpo_loss", "sigmoid_norm", "apo_zero")


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_extremes_stay_finite_and_where_it_is_promised_a_larger_margin_never_costs_more(name):
    settings = PairwiseSettings(0.1, label_smoothing=0.1 if name in ("robust", "exo_pair") else 0)
    c = torch.tensor([-1e4, -1.0, 0.0, 1.0, 4.0, 1e4], requires_grad=True)
    r = torch.tensor([1e4, -1.0, 0.0, 1.0, 4.0, -1e4], requires_grad=True)
    for values in (
        pairwise_loss(name)(pair_of(c), settings),
        pairwise_loss(name)(pair_of(c, r), settings),
        pairwise_loss(name)(pair_of(r, c), settings),
    ):
        to_c, to_r = torch.autograd.grad(values.sum(), (c, r), allow_unused=True)
        assert values.isfinite().all() and to_c.isfinite().all()
        assert to_r is None or to_r.isfinite().all()
    if name in MONOTONE:
        values = pairwise_loss(name)(pair_of(c, r), settings)
        to_c, to_r = torch.autograd.grad(values.sum(), (c, r))
        assert (to_c <= 0).all() and (to_r >= 0).all()


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_half_precision_log_probs_give_fp32_losses(name):
    pair = Pair(*(torch.full((2,), value).bfloat16() for value in (-3.0, -5.0, -2.0, -4.0, 2, 2)))
    assert PairwiseObjective.of(name, label_smoothing=0.1)(pair).dtype == torch.float32


def test_log_probs_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(B,\)"):
        DpoLoss()(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"\(B,\)"):
        DpoLoss()(torch.zeros(2), torch.zeros(2), torch.zeros(1), torch.zeros(2))


# Sums


def test_mpo_is_a_weighted_sum_with_the_chosen_responses_own_loss():
    """.8 x dpo(beta d = 3) + .2 x bco(2, -1) + 1.0 x .7."""
    mpo = PairwiseObjective.of(["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], beta=0.5)
    found = mpo(pair_of(4.0, -2.0), tensor(0.7))
    expected = 0.8 * -ls(3.0) + 0.2 * (0.126928 + 0.3132617) + 0.7
    assert found.item() == pytest.approx(expected, abs=1e-6)
    assert mpo.sft_coef == 1.0 and mpo.at_reference() is None
    without = PairwiseObjective.of(["sigmoid", "bco_pair"], [0.8, 0.2])
    assert without.at_reference() == pytest.approx(0.8 * LN2 + 0.2 * 2 * LN2)


def test_each_loss_of_a_sum_reads_its_own_view_of_the_pair():
    """dpo on sums against the reference, simpo on means without one: 2 x (4/4 - (-2)/2) - 1.4."""
    pair = Pair(*map(tensor, (4.0, -2.0, 1.0, 1.0, 4.0, 2.0)))
    found = PairwiseObjective.of(["dpo_loss", "simpo_loss"])(pair)
    assert found.item() == pytest.approx(-ls(0.6) - ls(2 * 2 - 1.4), abs=1e-6)


def test_length_normalization_averages_every_loss():
    pair = Pair(*map(tensor, (4.0, -2.0, 1.0, 1.0, 4.0, 2.0)))
    found = PairwiseObjective.of("dpo_loss", beta=1.0, length_normalization=True)(pair)
    assert_close(found, PairwiseObjective.of("sigmoid_norm", beta=1.0)(pair))
    assert found.item() == pytest.approx(-ls(0.75 + 1.5), abs=1e-6)


def test_a_single_loss_is_its_function_to_the_bit():
    pair = Pair(*torch.randn(6, 8).abs())
    expected = pairwise_loss("dpo_loss")(pair, PairwiseSettings(0.1))
    assert torch.equal(PairwiseObjective.of("dpo_loss")(pair), expected)


def test_defaults_are_each_losss_own_unless_given():
    def settings(*arguments, **keywords):
        return [term.settings for term in PairwiseObjective.of(*arguments, **keywords).terms]

    assert settings("simpo_loss") == [PairwiseSettings(2.0, 1.4)]
    assert settings(["dpo_loss", "simpo_loss"], beta=1.0, gamma=0.3) == [
        PairwiseSettings(1.0, 0.3),
        PairwiseSettings(1.0, 0.3),
    ]
    assert settings("ipo_loss", gamma=0.3, label_smoothing=0.1) == [PairwiseSettings(0.1)]


def test_exo_smooths_by_a_thousandth_where_nothing_is_given_and_says_so(capsys):
    (term,) = PairwiseObjective.of("exo_pair").terms
    assert term.settings.label_smoothing == 0.001
    assert "exo_pair: label smoothing 0.001" in capsys.readouterr().err
    (term,) = PairwiseObjective.of("exo_pair", label_smoothing=0.2).terms
    assert term.settings.label_smoothing == 0.2 and not capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("aot",), "loss_type 'aot': expected one of dpo_loss"),
        (("sft",), "loss_type sft: expected a pairwise loss"),
        ((["sigmoid", "sft"], [1.0]), "1 weights for the 2 losses sigmoid sft"),
    ],
)
def test_what_is_no_sum_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        PairwiseObjective.of(*arguments)


def test_names_and_references():
    assert pairwise_names(["sigmoid", "sft", "ipo"]) == ["dpo_loss", "ipo_loss"]
    assert set(ALIASES.values()) <= set(LOSS_TYPES)
    assert needs_reference("sigmoid") and not needs_reference(["simpo_loss", "sft"])
    assert needs_reference(["simpo_loss", "dpo_loss"])
