"""The KL controller: where a target draws the coefficient, what is refused, saved state."""

import json

import pytest
from torch.testing import assert_close

from coati.experience_maker.kl_controller import KLController


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.0, 1.0),
        (6.6, 1 + 0.1 * 0.5),
        (60.0, 1 + 0.2 * 0.5),
        (5.4, 1 - 0.1 * 0.5),
        (0.0, 1 - 0.2 * 0.5),
        (-9.0, 0.9),
    ],
)
def test_the_coefficient_is_drawn_toward_the_target(kl, factor):
    controller = KLController(0.1, target=6.0, horizon=100)
    controller.update(kl, responses=50)
    assert_close(controller.kl_coef, 0.1 * factor)


def test_without_target_the_coefficient_stays():
    controller = KLController(0.1)
    controller.update(1e9, 64)
    assert controller.kl_coef == 0.1


def test_a_horizon_of_less_than_a_fifth_of_a_phase_is_refused():
    """The coefficient would become 0 or negative, and stay so."""
    controller = KLController(0.1, target=1.0, horizon=10)
    with pytest.raises(ValueError, match="kl_horizon 10 is too short for 50 responses"):
        controller.update(0.0, responses=50)
    controller.update(0.0, responses=49)
    assert 0 < controller.kl_coef < 0.1


def test_the_controller_resumes():
    one, other = KLController(0.1, 6.0, 100), KLController(0.1, 6.0, 100)
    for kl in (3.0, 9.0):
        one.update(kl, 32)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for controller in (one, other):
        controller.update(7.0, 32)
    assert one.kl_coef == other.kl_coef != 0.1


@pytest.mark.parametrize(
    "settings", [(0.0, 6.0, 100), (0.1, 0.0, 100), (0.1, 6.0, 0), (0.1, -1.0, 100)]
)
def test_nothing_to_adapt_is_refused(settings):
    with pytest.raises(ValueError, match="must be above 0"):
        KLController(*settings)


def test_a_broken_kl_is_refused():
    with pytest.raises(ValueError, match="KL of a collect phase is nan"):
        KLController(0.1, 6.0).update(float("nan"), 8)
    with pytest.raises(ValueError, match="0 or more, not -0.1"):
        KLController(-0.1)
