"""The learning rate of every step, worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from coati.parallel.lr_schedule import SCHEDULES, LRSchedule, set_position
from coati.parallel.optimizer import OptimizerSettings


def rates(total: int, warmup: int | None, steps: int | None = None, **shape) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = LRSchedule(warmup_steps=warmup, **shape).bind(optimizer, total)
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


def test_the_default_is_the_cosine_of_earlier_releases_to_the_bit():
    """Their formula, as it stood."""
    for total, warmup in ((7, 0), (50, 3), (1000, 25)):
        expected = [
            (step + 1) / warmup
            if step < warmup
            else 0.1
            + (1 - 0.1)
            * 0.5
            * (1 + math.cos(math.pi * min(1.0, (step - warmup) / (total - warmup))))
            for step in range(total)
        ]
        assert rates(total, warmup) == expected
    assert OptimizerSettings(warmup_steps=3).schedule == LRSchedule(warmup_steps=3)


def test_linear_by_hand():
    """A line from 1 to 0.2 in four steps after two of warm-up."""
    assert rates(6, 2, 8, name="linear", min_ratio=0.2) == pytest.approx(
        [0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2]
    )


def test_constant_by_hand():
    assert rates(5, 2, 7, name="constant") == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_warmup_stable_decay_by_hand():
    """Two steps up, four at the peak, the last four (0.4 of 10) a line to 0."""
    expected = [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    found = rates(10, 2, 11, name="wsd", min_ratio=0.0, decay_ratio=0.4)
    assert found == pytest.approx(expected)


def test_a_decay_that_would_begin_in_the_warm_up_begins_after_it():
    found = rates(4, 2, name="wsd", min_ratio=0.0, decay_ratio=1.0)
    assert found == pytest.approx([0.5, 1.0, 1.0, 0.5])


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


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_single_step_has_the_full_rate(name):
    assert rates(1, None, name=name) == [1.0] and rates(1, 1, name=name) == [1.0]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_put_at_a_step_goes_on_as_one_that_came_there(name):
    """In all groups, each with a peak of its own."""
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in (1.0, 0.5)]
    optimizer = torch.optim.SGD(groups)
    schedule = LRSchedule(name, 2).bind(optimizer, 10)
    set_position(schedule, optimizer, 4)
    expected = rates(10, 2, name=name)[4:]
    for rate in expected:
        assert [group["lr"] for group in optimizer.param_groups] == [rate, 0.5 * rate]
        assert schedule.get_last_lr() == [rate, 0.5 * rate]
        optimizer.step()
        schedule.step()


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="'cubic': choose from cosine, linear, constant, wsd"):
        LRSchedule("cubic").factor(4)


def test_what_a_checkpoint_holds_replaces_none_of_the_optimizers_settings():
    """Moments come from the checkpoint; rate, decay and betas are those of the run."""
    from coati.parallel.optimizer_state import load_rank_state, random_state

    def adam(lr: float, decay: float, beta2: float) -> torch.optim.AdamW:
        weight = torch.ones(2, requires_grad=True)
        optimizer = torch.optim.AdamW([weight], lr=lr, weight_decay=decay, betas=(0.9, beta2))
        weight.grad = torch.tensor([1.0, 2.0])
        optimizer.step()
        return optimizer

    before = adam(1e-3, 0.1, 0.95)
    now = adam(1e-4, 0.5, 0.99)
    held = {"masters": [], "optimizer": before.state_dict(), "scaler": None, "amp": None}
    engine = SimpleNamespace(
        optimizer=SimpleNamespace(optim=now), options=SimpleNamespace(plugin="ddp")
    )
    load_rank_state(engine, held | {"random": random_state()})
    group = now.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (1e-4, 0.5, (0.9, 0.99))
    (moments,) = now.state.values()
    (saved,) = before.state.values()
    assert torch.equal(moments["exp_avg"], saved["exp_avg"])
