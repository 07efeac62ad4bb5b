import sys
import time
from types import SimpleNamespace

import pytest

from coati.trainer import progress
from coati.trainer.progress import ProgressBar


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr(progress, "in_terminal", lambda: True)


class Clock:
    """Stands for the time module; moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def test_a_pipe_gets_whole_lines_and_nothing_that_redraws(capsys, clock):
    bar = ProgressBar(30, 0, "sft")
    for _ in range(30):
        clock.now += 1
        bar.step(loss=0.5)
    bar.close()
    said = capsys.readouterr()
    assert said.out == "" and "\r" not in said.err and "\x1b" not in said.err
    lines = said.err.splitlines()
    assert lines == [
        "coati: sft: step 1 of 30, loss 0.5, 29 s left",
        "coati: sft: step 11 of 30, loss 0.5, 19 s left",
        "coati: sft: step 21 of 30, loss 0.5, 9 s left",
        "coati: sft: step 30 of 30, loss 0.5",
    ]


def test_a_slow_first_step_says_little_of_the_others(capsys, clock):
    bar = ProgressBar(10, 0, "sft")
    clock.now += 50
    bar.step()
    for _ in range(5):
        clock.now += 4
        bar.step()
    bar.close()
    assert capsys.readouterr().err.splitlines()[1] == "coati: sft: step 4 of 10, 24 s left"


def test_an_evaluation_counts_neither_in_the_rate_nor_in_the_time_left(capsys, clock):
    bar = ProgressBar(10, 0, "sft")
    with bar.paused("evaluating"):
        clock.now += 100
    clock.now += 2
    bar.step()
    with bar.paused("saving"):
        clock.now += 100
    clock.now += 2
    bar.step()
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "coati: sft: step 1 of 10, 18 s left",
        "coati: sft: step 2 of 10, 16 s left",
    ]


def test_the_bar_of_a_terminal_leaves_out_the_same(terminal, monkeypatch):
    bar = ProgressBar(10, 0, "sft")
    inner = bar._display._bar
    start = inner.start_t
    with bar.paused("evaluating"):
        time.sleep(0.2)
    assert 0.2 <= inner.start_t - start < 0.4
    assert inner._time() - inner.start_t < 0.2  # what the rate is computed from
    bar.close()


def test_an_evaluation_has_a_bar_of_its_own(terminal, capsys):
    bar = ProgressBar(10, 0, "sft")
    assert list(bar.over([1, 2, 3], "evaluating")) == [1, 2, 3]
    bar.close()
    said = capsys.readouterr().err
    assert "evaluating" in said and "3 [" in said.replace("0/3", "/3")


def test_the_last_state_of_a_bar_is_drawn_once(terminal, capsys):
    """Each line of a terminal is what was drawn last before it ended."""
    bar = ProgressBar(2, 0, "sft")
    bar.step(loss=1.0)
    bar.step(loss=0.5)
    bar.write("evaluation")
    bar.close()
    lines = [line.rsplit("\r", 1)[-1] for line in capsys.readouterr().err.split("\n")]
    assert sum("100%" in line for line in lines) == 1


def test_a_resumed_run_goes_on_counting(capsys, clock):
    bar = ProgressBar(10, 8, "ppo", unit="episode")
    bar.phase("rollout 1/2")
    clock.now += 3
    bar.step()
    clock.now += 3
    bar.step()
    bar.close()
    assert capsys.readouterr().err.splitlines() == [
        "coati: ppo: episode 9 of 10, 3 s left",
        "coati: ppo: episode 10 of 10",
    ]


def test_other_ranks_show_nothing(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    bar = ProgressBar(2, 0, "sft")
    bar.step(loss=1.0)
    assert list(bar.over([1], "evaluating")) == [1]
    bar.write("text")
    bar.close()
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")


def test_a_terminal_is_standard_error_or_a_notebook(monkeypatch):
    assert not progress.in_terminal()
    # IPython in a terminal has a shell too, but no kernel.
    for shell, draws in (
        (None, False),
        (SimpleNamespace(), False),
        (SimpleNamespace(kernel=1), True),
    ):
        notebook = SimpleNamespace(get_ipython=lambda shell=shell: shell)
        monkeypatch.setitem(sys.modules, "IPython", notebook)
        assert progress.in_terminal() == draws


@pytest.mark.parametrize("drawn", [False, True])
def test_bars_of_others_are_drawn_where_they_can_be_and_come_back(monkeypatch, drawn):
    from datasets import are_progress_bars_disabled
    from transformers.utils.logging import is_progress_bar_enabled

    before = is_progress_bar_enabled(), are_progress_bars_disabled()
    monkeypatch.setattr(progress, "in_terminal", lambda: drawn)
    with pytest.raises(KeyError), progress.bars_in_terminals_alone():
        inside = is_progress_bar_enabled(), are_progress_bars_disabled()
        raise KeyError
    assert inside == (before if drawn else (False, True))
    assert (is_progress_bar_enabled(), are_progress_bars_disabled()) == before


def test_a_step_speaks_only_when_it_takes_far_longer_than_the_one_before(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "in_terminal", lambda: False)
    bar = ProgressBar(3, 0, "sft")
    step = bar._display._phase
    assert not step.due(4.9) and step.due(5.0)  # the first one, which compiles
    now[0] = 8.0
    bar.step(loss=1.0)
    assert not step.due(8.0 + 23.9) and step.due(8.0 + 24.0)
    now[0] = 9.0  # a quick one: five seconds are long again
    bar.step(loss=1.0)
    assert not step.due(9.0 + 4.9) and step.due(9.0 + 5.0)
    bar.close()
