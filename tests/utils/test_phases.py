import os
import threading
import time

import pytest

from coati.utils import phases
from coati.utils.phases import Phase, duration, phase


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Hundredths of a second are seconds."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(phases, "FIRST_S", 0.1)
    monkeypatch.setattr(phases, "GAP_S", (0.2, 0.4))


def test_a_short_phase_is_silent(capsys):
    with phase("loading"):
        time.sleep(0.02)
    time.sleep(0.15)
    assert capsys.readouterr().err == ""


def test_a_long_phase_says_so_at_growing_intervals_and_how_long_it_took(capsys):
    with phase("loading") as current:
        time.sleep(0.2)
        first = capsys.readouterr().err
        current.detail = "batch 2 of 3"
        time.sleep(1.0)
        assert first == "coati: loading: 0 s so far\n"
        # At 0.1, then 0.2 and 0.4 later: not every tenth of a second.
        later = capsys.readouterr().err.splitlines()
        assert later == ["coati: loading, batch 2 of 3: 0 s so far"] * 1 + [
            "coati: loading, batch 2 of 3: 1 s so far"
        ] * (len(later) - 1)
        assert 2 <= len(later) <= 3
    assert capsys.readouterr().err == "coati: loading took 1 s\n"


def test_the_innermost_long_phase_speaks_for_all(capsys):
    with phase("saving"), phase("writing"):
        time.sleep(0.2)
    said = capsys.readouterr().err.splitlines()
    assert said == ["coati: writing: 0 s so far", "coati: writing took 0 s"]


def test_many_short_phases_inside_a_long_one_are_said_by_the_long_one(capsys):
    with phase("reading", closing=False):
        for _ in range(10):
            with phase("waiting"):
                time.sleep(0.03)
    assert set(capsys.readouterr().err.splitlines()) == {"coati: reading: 0 s so far"}


def test_a_phase_that_fails_says_no_time_and_leaves_nothing_behind(capsys):
    with pytest.raises(ValueError), phase("loading"):
        time.sleep(0.2)
        raise ValueError
    assert "took" not in capsys.readouterr().err and not phases._open


def test_what_a_bar_shows_is_not_said(capsys):
    with phase("evaluating") as current:
        current.shown = True
        time.sleep(0.2)
    assert capsys.readouterr().err == ""


def test_only_rank_0_speaks_and_other_ranks_watch_nothing(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    before = threading.active_count()
    with phase("loading"):
        assert threading.active_count() <= before
        time.sleep(0.2)
    assert capsys.readouterr().err == ""


def test_the_watcher_ends_with_the_last_phase():
    with phase("loading"):
        assert phases._watcher is not None
    time.sleep(0.1)
    assert phases._watcher is None


def test_a_forked_process_does_nothing_of_what_its_parent_does():
    with phase("loading"):
        child = os.fork()
        if child == 0:
            os._exit(0 if not phases._open and phases._watcher is None else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_function_may_be_a_phase(capsys):
    @phase("thinking")
    def slow(answer):
        time.sleep(0.2)
        return answer

    assert [slow(1), slow(2)] == [1, 2]
    assert capsys.readouterr().err.count("coati: thinking took 0 s") == 2


def test_the_first_line_comes_after_five_seconds_and_gaps_grow(monkeypatch):
    monkeypatch.undo()
    made = Phase("loading")
    assert not made.due(made.began + 4.9) and made.due(made.began + 5)
    gaps = []
    now = made.began + 5
    for _ in range(8):
        made.put_off(now)
        gaps.append(round(made._due - now))
        now = made._due
    assert gaps == [10, 20, 40, 80, 160, 300, 300, 300]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.6, "5 s"), (59.7, "1 min 0 s"), (185, "3 min 5 s"), (7800, "2 h 10 min")],
)
def test_durations_are_said_as_people_do(seconds, text):
    assert duration(seconds) == text
