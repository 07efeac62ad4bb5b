"""Systems that take their steps in turn: one that fails or hangs is named, and the others go on."""

import os
import sys
from functools import partial

import pytest

from benchmarks.peer_worker import Worker, WorkerFailed, take_turns

GOOD = """
import json, sys
print("ready", flush=True)
for number, line in zip(range(int(sys.argv[1])), sys.stdin):
    print("a word of some library")
    print(json.dumps({"seconds": 1.0 + number}), flush=True)
print(json.dumps({"peak_mb": 7.0}), flush=True)
"""
ENDS = """
import sys
print("ready", flush=True)
sys.stdin.readline()
raise MemoryError("no room for logits")
"""
HANGS = """
import sys, time
print("ready", flush=True)
time.sleep(600)
"""


def worker(name: str, code: str, steps: int, limit: float = 60.0) -> partial:
    return partial(Worker, name, [sys.executable, "-c", code, str(steps)], limit=limit)


def test_the_order_is_turned_round_after_the_steps_that_belong_together():
    order: list[int] = []
    makers = {name: worker(name, GOOD, 4) for name in ("coati", "other")}
    turns = take_turns(makers, 4, together=2, between=lambda: order.append(1))
    assert len(order) == 8 and turns.failed == {}
    assert turns.peaks == {"other": 7.0, "coati": 7.0}
    assert [step["seconds"] for step in turns.steps["other"]] == [1.0, 2.0, 3.0, 4.0]
    assert list(turns.steps) == ["coati", "other"]


def test_a_peer_that_ends_or_hangs_is_named_and_the_others_go_on():
    makers = {
        "coati": worker("coati", GOOD, 2),
        "ends": worker("ends", ENDS, 2),
        "hangs": worker("hangs", HANGS, 2, limit=2.0),
        "never ready": worker("never ready", "raise SystemExit('no such library')", 2),
        "good": worker("good", GOOD, 2),
    }
    turns = take_turns(makers, 2)
    assert turns.failed == {
        "ends": "ended with code 1: MemoryError: no room for logits",
        "hangs": "no step within 2 s",
        "never ready": "ended with code 1: no such library",
    }
    assert {name: len(steps) for name, steps in turns.steps.items()} == {"coati": 2, "good": 2}


def test_a_failure_of_the_library_ends_the_comparison():
    started: list[Worker] = []

    def other() -> Worker:
        started.append(worker("other", HANGS, 1, limit=1.0)())
        return started[0]

    # in the first round the others, of which this one hangs, take their turn before the library
    with pytest.raises(WorkerFailed, match="no room for logits"):
        take_turns({"coati": worker("coati", ENDS, 1), "other": other}, 1)
    assert [one.process.poll() is None for one in started] == [False]


def test_a_worker_finds_the_packages_of_its_folder_first(tmp_path, monkeypatch):
    (tmp_path / "only_there.py").write_text("print('ready', flush=True)\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    found = Worker("one", [sys.executable, "-c", "import only_there"], site=tmp_path)
    assert found.process.wait(60) == 0
