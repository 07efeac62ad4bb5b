"""What the checks of a run find is said as the library's other messages are, and recorded."""

from types import SimpleNamespace

from coati.trainer.monitor.rl_reporter import RLReporter

FOUND = "warning: the reward falls"


class Bar:
    def __init__(self):
        self.written = []
        self.write = self.written.append

    def step(self, **_):
        pass


def test_findings_of_an_episode_are_messages(capfd):
    notes = []
    record = SimpleNamespace(note=lambda text, step: notes.append((text, step)))
    log = SimpleNamespace(record=record, tracker=SimpleNamespace(log=lambda *_: None))
    checks = SimpleNamespace(check=lambda *_: [FOUND])
    names = ("reward", "approx_kl", "response_length", "tokens_per_second")
    bar = Bar()
    RLReporter(log, checks, {}, SimpleNamespace()).log_episode(dict.fromkeys(names, 0.0), 3, bar)
    assert notes == [(FOUND, 3)] and bar.written == []
    out, err = capfd.readouterr()
    assert err.splitlines() == [f"coati: {FOUND}"] and out == ""
