"""A run knows whether the torchrun that starts it has begun it."""

import pytest

from coati.recipes import elastic


@pytest.fixture
def torchrun(monkeypatch):
    """``torchrun("node1 7 1.5", ...)``: these agents start the run."""

    def started_by(*agents: str) -> None:
        monkeypatch.setenv(elastic.RUN_ID, "run1")
        monkeypatch.setattr(elastic, "all_gather_object", lambda mine: list(agents))

    monkeypatch.delenv(elastic.RUN_ID, raising=False)
    return started_by


def test_without_torchrun_nothing_is_a_restart_and_nothing_written(tmp_path, torchrun):
    elastic.record_agents(str(tmp_path))
    assert not elastic.is_restart(str(tmp_path)) and not list(tmp_path.iterdir())


def test_one_agent_that_began_it_is_enough(tmp_path, torchrun):
    torchrun("node1 7 1.5", "node2 9 1.5")
    assert not elastic.is_restart(str(tmp_path))  # a first start, whatever lies there
    elastic.record_agents(str(tmp_path))
    torchrun("node1 7 1.5", "node3 2 8.0")  # a host was replaced
    assert elastic.is_restart(str(tmp_path))
    torchrun("node1 7 99.0", "node2 9 99.0")  # other processes of the same ids
    assert not elastic.is_restart(str(tmp_path))


def test_the_agent_is_the_parent_process(torchrun, monkeypatch):
    monkeypatch.setenv(elastic.RUN_ID, "run1")
    import os

    (mine,) = elastic.agents()
    assert mine.split()[1] == str(os.getppid())
