"""What a program and its report say when a collective fails because another rank has ended."""

import json
from types import SimpleNamespace

import pytest

from coati.cli.verb import Verb
from coati.parallel import launch
from coati.recipes.command import _run_in_group
from coati.trainer.run_log import RunLog
from coati.trainer.schedule import RunSchedule
from coati.utils.errors import RunFailed
from coati.utils.liveness import forced_end_callbacks

GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]"
NCCL = "NCCL error in: ProcessGroupNCCL.cpp:2, remote process exited or there was a network error"
WHY = "rank 1 on node2 has ended: its own message, or the log of its host, says why"


@pytest.fixture(autouse=True)
def heartbeat(monkeypatch):
    stub = SimpleNamespace(explain=lambda: WHY, leave=lambda wait: None, stop=lambda: None)
    monkeypatch.setattr(launch, "_heartbeat", stub)
    monkeypatch.setattr(launch.dist, "is_initialized", lambda: False)


def running(monkeypatch, function) -> None:
    verb = Verb("training", None, None, "nothing:main", processes=True)
    monkeypatch.setattr(Verb, "function", lambda self: function)
    _run_in_group(verb, None, "coati sft")


@pytest.mark.parametrize("text", [GLOO, NCCL])
def test_the_program_names_the_rank(monkeypatch, text):
    def fail(_settings):
        raise RuntimeError(text)

    with pytest.raises(RunFailed, match="^rank 1 on node2 has ended") as caught:
        running(monkeypatch, fail)
    assert caught.value.__suppress_context__  # no gloo in a traceback either


@pytest.mark.parametrize("text", ["mat1 and mat2 shapes cannot be multiplied", "out of memory"])
def test_other_errors_stay_what_they_are(monkeypatch, text):
    def fail(_settings):
        raise RuntimeError(text)

    with pytest.raises(RuntimeError, match=text) as caught:
        running(monkeypatch, fail)
    assert not isinstance(caught.value, RunFailed)


def test_a_forced_end_says_its_message_on_a_line_of_its_own(monkeypatch, capsys):
    monkeypatch.delenv("COATI_ERROR_FILE", raising=False)
    monkeypatch.setenv("RANK", "1")

    def end(_settings):
        for callback in forced_end_callbacks():
            callback(WHY)

    running(monkeypatch, end)
    assert capsys.readouterr().err == f"\n[rank 1] coati sft: error: {WHY}\n"
    assert not forced_end_callbacks()


def test_the_report_names_the_rank(tmp_path):
    log = RunLog("sft", RunSchedule(save_dir=str(tmp_path)), {})
    log.open(0, None, False, 10)
    log.fail(RuntimeError(GLOO), 3)
    log.close()
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    (failed,) = [event for event in events if event["event"] == "failed"]
    assert failed["text"] == f"RunFailed: {WHY}" and failed["step"] == 3
