"""The learning rate of every step, worked out by hand."""

import math

import pytest
import torch

from coati.parallel.optimizer import cosine_with_warmup


def rates(total: int, warmup: int | None, steps: int | None = None) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = cosine_with_warmup(optimizer, total, warmup)
    found = []
    for _ in range(total if steps is None else steps):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


def test_warm_up_and_cosine_by_hand():
    """0.1 + 0.45 (1 + cos(pi k / 4)) for k = 0..3 after two steps of warm-up; the fifth would be
    0.1."""
    half = math.sqrt(0.5)
    cosine = [1.0, 0.55 + 0.45 * half, 0.55, 0.55 - 0.45 * half]
    assert rates(6, 2) == pytest.approx([0.5, 1.0, *cosine])


def test_after_the_end_it_stays_at_a_tenth():
    assert rates(4, 0, steps=7)[4:] == pytest.approx([0.1, 0.1, 0.1])


def test_a_fortieth_of_the_steps_is_warm_up_by_default():
    assert rates(80, None, 3) == pytest.approx([0.5, 1.0, 1.0])
    assert rates(39, None, 1) == [1.0]


def test_a_warm_up_as_long_as_the_run_is_cut_and_said(capsys):
    assert rates(4, 100) == pytest.approx([0.5, 1.0, 1.0, 0.55])
    assert (
        "--warmup_steps 100 is not below the 4 steps of this run: cut to 2"
        in capsys.readouterr().err
    )


def test_a_single_step_has_the_full_rate():
    assert rates(1, None) == [1.0] and rates(1, 1) == [1.0]
