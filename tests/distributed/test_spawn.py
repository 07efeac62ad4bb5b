"""The module that starts real processes gives results by rank, shows what failed, and leaves nobody
behind."""

import os

import pytest

from tests.distributed.spawn import WorkerFailed, run


def test_results_come_by_rank_with_a_launchers_variables():
    assert run(2, "tests.distributed.samples:where", env={"EXTRA": "x"}) == [
        ("0", "2", "x"),
        ("1", "2", "x"),
    ]


def test_a_failure_is_shown_and_the_other_rank_is_ended(tmp_path):
    pids = tmp_path / "pid"
    with pytest.raises(WorkerFailed, match="rank 0 has had enough"):
        run(2, "tests.distributed.samples:first_fails", str(pids), timeout=30)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pids.read_text()), 0)


def test_a_rank_that_hangs_shows_where():
    with pytest.raises(WorkerFailed, match="sleep_on"):
        run(1, "tests.distributed.samples:sleep_on", timeout=1)
