"""Episodes that are asked for ahead: in which order, of which weights, and where a stopped run goes
on. Models are stubs, and one engine that answers from a thread."""

import json
import os
import signal
import threading
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from coati.dataset.load.loader import EvaluationLoader
from coati.experience_maker.experience import Experience
from coati.experience_maker.rollouts.pending_rollouts import RolloutsLost
from coati.models.rollout_correction import RolloutCorrection
from coati.parallel.checkpoint import RunningState
from coati.trainer.collecting import correction_metrics
from coati.trainer.online import OLTrainer
from coati.trainer.schedule import RunSchedule
from tests.experience_maker.stubs import StubEngine
from tests.trainer.test_online import Collate, Engine, Maker, Rows, loader, prompts_of, trainer


def ahead_by(count: int, actor=None, maker=None, episodes: int = 5, **changes) -> OLTrainer:
    """:func:`tests.trainer.test_online.trainer`: 5 episodes of 4 optimizer steps."""
    made = trainer(actor, maker, **changes)
    made.episodes = replace(made.episodes, ahead=count, num_episodes=episodes)
    return made


def order(maker: Maker) -> list[tuple]:
    """The events, each batch of an episode but the first left out."""
    return [
        e for e, before in zip(maker.events, [None, *maker.events], strict=False) if e != before
    ]


@pytest.fixture
def saves(monkeypatch, tmp_path) -> list[dict[str, Any]]:
    """What was saved: state, buffer and rollouts, as files would give them back."""
    saved: list[dict[str, Any]] = []

    def save(folder, models, state, buffer_state=None, rollouts=None):
        torch.save({"buffer_state": buffer_state, "rollouts": rollouts}, tmp_path / "it.pt")
        held = torch.load(tmp_path / "it.pt", weights_only=True)
        saved.append(held | {"state": json.loads(json.dumps(vars(state)))})
        return tmp_path

    monkeypatch.setattr("coati.trainer.online.save_models", save)
    return saved


def gone_on(saved: dict[str, Any], count: int, **changes) -> OLTrainer:
    given = saved | {"state": RunningState(**saved["state"])}
    return ahead_by(count, **given, **changes)


def test_without_asking_ahead_every_episode_is_of_the_weights_of_now():
    made = ahead_by(0)
    made.run(loader())
    expected = []
    for episode in range(5):
        version = 4 * episode
        expected += [("publish", version), ("ask", episode), ("collect", episode, version)]
    assert order(made.maker) == [*expected, ("publish", 20)]


def test_two_ahead():
    """The first three are of the first weights, then each of those of two episodes before; nothing
    is asked for beyond the last."""
    made = ahead_by(2)
    made.run(loader())
    assert order(made.maker) == [
        ("publish", 0),
        *(("ask", episode) for episode in (0, 1, 2)),
        *(("collect", 0, 0), ("publish", 4), ("ask", 3)),
        *(("collect", 1, 0), ("publish", 8), ("ask", 4)),
        *(("collect", 2, 0), ("publish", 12)),
        *(("collect", 3, 4), ("publish", 16)),
        *(("collect", 4, 8), ("publish", 20)),
    ]


@pytest.mark.parametrize("count", [1, 2, 9])
def test_prompts_noise_and_temperature_are_those_of_the_episode(count):
    """Through the ends of epochs, too: the calls and the steps are those of a run that asks for one
    at a time."""
    whole = ahead_by(0)
    whole.run(loader())
    made = ahead_by(count)
    made.run(loader())
    assert made.maker.calls == whole.maker.calls
    assert made.engine.steps == whole.engine.steps
    assert vars(made.state) == vars(whole.state) and made.state.epoch == 2


def test_an_evaluation_is_of_the_weights_of_now_and_disturbs_nothing():
    class Evaluated(Maker):
        def rollout_and_score(self, batch, rows, episode, temperature):
            if episode > 5:
                self.events.append(("evaluate", self.published[-1]))
            return super().rollout_and_score(batch, rows, episode, temperature)

    made = ahead_by(1, maker=Evaluated(), schedule=RunSchedule(eval_interval=2))
    made.run(loader(), EvaluationLoader(Rows(2), Collate(), batch_size=2))
    seen = order(made.maker)
    assert [event[1] for event in seen if event[0] == "evaluate"] == [0, 8, 16, 20]
    whole = ahead_by(1)
    whole.run(loader())
    assert [event for event in seen if event[0] != "evaluate"] == order(whole.maker)


def test_a_rehearsal_asks_for_one_episode():
    made = ahead_by(3)
    made.rehearse(loader())
    assert {event[1] for event in made.maker.events if event[0] == "ask"} == {0}


def test_saved_between_episodes_what_was_asked_for_is_stored(saves, tmp_path):
    """As after kill -9: each checkpoint of a run goes on as the run itself did."""
    whole = ahead_by(2, schedule=RunSchedule(str(tmp_path), 1))
    whole.run(loader())
    assert [sorted(saved["rollouts"] or {}) for saved in saves] == [
        ["1", "2"],
        ["2", "3"],
        ["3", "4"],
        ["4"],
        [],
    ]
    for done, saved in enumerate(saves[:4], 1):
        made = gone_on(saved, 2)
        made.run(loader())
        assert made.engine.steps == whole.engine.steps[4 * done :]
        collected = [event for event in order(whole.maker) if event[0] == "collect"]
        assert [e for e in order(made.maker) if e[0] == "collect"] == collected[done:]
        assert [e[1] for e in order(made.maker) if e[0] == "ask"] == list(range(done + 2, 5))
        assert vars(made.state) | {"trainer": {}} == vars(whole.state) | {"trainer": {}}


@pytest.mark.parametrize("count, at", [(1, 5), (1, 6), (2, 5), (2, 6)])
def test_stopped_inside_an_update(saves, tmp_path, count, at):
    whole = ahead_by(count)
    whole.run(loader())
    first = ahead_by(count, Engine(stop_at=at), schedule=RunSchedule(str(tmp_path)))
    first.run(loader())
    (saved,) = saves
    assert sorted(saved["rollouts"]) == ["2", "3"][:count]
    assert saved["buffer_state"] is not None
    second = gone_on(saved, count)
    second.run(loader())
    assert first.engine.steps + second.engine.steps == whole.engine.steps
    assert first.maker.calls + second.maker.calls == whole.maker.calls


@pytest.mark.parametrize("stop_at", [1, 2, 4, 6, 7])
def test_stopped_while_asking(saves, tmp_path, stop_at):
    """An episode of which a batch was not asked for is asked for again, whole, of the same
    weights."""
    whole = ahead_by(2)
    whole.run(loader())
    first = ahead_by(2, maker=Maker(stop_at=stop_at), schedule=RunSchedule(str(tmp_path)))
    first.run(loader())
    (saved,) = saves
    second = gone_on(saved, 2)
    second.run(loader())
    assert first.engine.steps + second.engine.steps == whole.engine.steps
    kept = 2 * (stop_at // 2)  # batches of episodes that were asked for whole
    assert first.maker.calls[:kept] + second.maker.calls == whole.maker.calls
    collected = [e for made in (first, second) for e in order(made.maker) if e[0] == "collect"]
    assert collected == [e for e in order(whole.maker) if e[0] == "collect"]


class Stopped(Maker):
    """SIGTERM comes while the experience of the third batch is made."""

    def make_experience(self, pending):
        made = super().make_experience(pending)
        if self.answered == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return made


@pytest.mark.parametrize("count", [0, 1, 2])
def test_stopped_while_collecting(saves, tmp_path, count):
    whole = ahead_by(count)
    whole.run(loader())
    first = ahead_by(count, maker=Stopped(), schedule=RunSchedule(str(tmp_path)))
    first.run(loader())
    (saved,) = saves
    assert first.maker.answered == 4 and saved["state"]["trainer"]["maker"]["answered"] == 4
    # With nothing ahead the answers are not kept: the same weights give them again.
    held = [str(number) for number in range(1, 2 + count)] if count else []
    assert sorted(saved["rollouts"] or {}) == held
    second = gone_on(saved, count)
    second.run(loader())
    assert first.engine.steps + second.engine.steps == whole.engine.steps


@pytest.mark.parametrize("now, asked", [(0, [3, 4]), (1, [3, 4]), (3, [3, 4])])
def test_another_number_ahead_takes_effect_after_what_is_stored(saves, tmp_path, now, asked):
    """Stored were 1 and 2, asked for at version 0."""
    made = ahead_by(2, schedule=RunSchedule(str(tmp_path), 1))
    made.run(loader())
    other = gone_on(saves[0], now)
    other.run(loader())
    assert [event[1] for event in order(other.maker) if event[0] == "ask"] == asked
    versions = [event[2] for event in order(other.maker) if event[0] == "collect"]
    assert versions == {0: [0, 0, 12, 16], 1: [0, 0, 8, 12], 3: [0, 0, 4, 4]}[now]
    assert other.engine.steps == made.engine.steps[4:]


def test_fewer_episodes_leave_the_rest_of_what_is_stored(saves, tmp_path):
    ahead_by(2, schedule=RunSchedule(str(tmp_path), 1)).run(loader())
    other = gone_on(saves[0], 2, episodes=2)
    other.run(loader())
    assert order(other.maker) == [("publish", 4), ("collect", 1, 0), ("publish", 8)]


def test_episodes_of_another_size_are_asked_for_again(saves, tmp_path, capsys):
    whole = ahead_by(2, schedule=RunSchedule(str(tmp_path), 1))
    whole.run(loader())
    capsys.readouterr()
    other = gone_on(saves[0], 2)
    other.episodes = replace(other.episodes, steps_per_pass=1)
    other.run(loader(steps=1))
    assert "of other numbers of prompts or generations" in capsys.readouterr().err
    assert order(other.maker)[:5] == [
        ("publish", 4),
        *(("ask", episode) for episode in (1, 2, 3)),
        ("collect", 1, 4),
    ]
    assert prompts_of(other.maker)[:2] == prompts_of(whole.maker)[4:6]  # from where it stood


def test_an_episode_that_starts_over_goes_before_what_is_stored(saves, tmp_path, capsys):
    """Stopped inside the second, whose updates are divided otherwise now."""
    first = ahead_by(1, Engine(stop_at=5), schedule=RunSchedule(str(tmp_path)))
    first.run(loader())
    other = gone_on(saves[0], 1)
    assert len(other.buffer)
    saves[0]["state"]["trainer"]["cut"] = [9, 9, 9]
    other = gone_on(saves[0], 1)
    assert not len(other.buffer) and "that episode starts over" in capsys.readouterr().err
    other.run(loader())
    assert order(other.maker)[:3] == [("publish", 6), ("ask", 1), ("collect", 1, 6)]
    whole = ahead_by(0)
    whole.run(loader())
    assert prompts_of(other.maker) == [
        *prompts_of(whole.maker)[4:8],
        *prompts_of(whole.maker)[12:],
    ]


@pytest.mark.parametrize("count, lost_at", [(0, 2), (1, 2), (2, 3)])
def test_without_a_sampler_the_run_saves_and_ends(saves, tmp_path, capsys, count, lost_at):
    maker = Maker()
    maker.lost_at = lost_at
    first = ahead_by(count, maker=maker, schedule=RunSchedule(str(tmp_path)))
    with pytest.raises(RolloutsLost, match="no server answers"):
        first.run(loader())
    (saved,) = saves
    assert first.episode == lost_at
    # The other one had been answered.
    assert sorted(saved["rollouts"] or {}) == {0: [], 1: ["3"], 2: ["4"]}[count]
    assert ("have not come" in capsys.readouterr().err) == (count > 0)
    second = gone_on(saved, count)
    second.run(loader())
    whole = ahead_by(count)
    whole.run(loader())
    assert first.engine.steps + second.engine.steps == whole.engine.steps
    versions = {e[1]: e[2] for e in order(second.maker) if e[0] == "collect"}
    assert versions[lost_at] == 4 * lost_at  # of its own weights


def test_a_save_that_finds_no_sampler_saves_what_is_there(saves, tmp_path):
    maker = Maker()
    maker.lost_at = 2
    first = ahead_by(2, maker=maker, schedule=RunSchedule(str(tmp_path), 1))
    with pytest.raises(RolloutsLost):
        first.run(loader())
    (saved,) = saves
    assert first.episode == 1 and sorted(saved["rollouts"]) == ["1"]
    second = gone_on(saved, 2)
    second.run(loader())
    assert second.episode == 5


class Elsewhere(Maker):
    """Answers come from a thread, a moment after they were asked for."""

    def ask(self, batch, rows, episode, temperature):
        pending = super().ask(batch, rows, episode, temperature)
        later: Future = Future()
        answer = pending.parts[0].result()
        timer = threading.Timer(0.05, lambda: later.cancelled() or later.set_result(answer))
        timer.daemon = True
        timer.start()
        pending.parts = [later]
        return pending


def test_a_stop_waits_for_what_is_pending_and_stores_it(saves, tmp_path):
    whole = ahead_by(1)
    whole.run(loader())
    actor = Engine(stop_at=1)
    first = ahead_by(1, actor, maker=Elsewhere(), schedule=RunSchedule(str(tmp_path)))
    first.run(loader())
    (saved,) = saves
    assert sorted(saved["rollouts"]) == ["1"]
    second = gone_on(saved, 1, maker=Elsewhere())
    second.run(loader())
    assert first.engine.steps + second.engine.steps == whole.engine.steps


def test_the_gap_of_an_episode_over_all_ranks():
    """Two responses of version 4 and one of 8, the version that is updated; another rank adds its
    own sums."""
    mask = torch.ones(3, 2, dtype=torch.bool)
    policy = torch.zeros(3, 2)
    one = Experience(
        torch.zeros(3, 3, dtype=torch.long),
        torch.ones(3, 3, dtype=torch.bool),
        mask,
        policy,
        torch.zeros(3),
        torch.arange(3),
        sampled_log_probs=torch.tensor([[-0.1, -0.3], [0.0, -0.4], [-0.05, -0.15]]),
        version=torch.tensor([4, 4, 8]),
    )
    found = correction_metrics([one], RolloutCorrection(), 8, StubEngine())
    assert found["staleness_gap"] == pytest.approx(0.2)
    assert found["rollout_gap"] == pytest.approx(0.1)
    assert found["rollout_gap_max"] == pytest.approx(0.4)
    assert found["staleness"] == pytest.approx(8 / 3)
    others = {11: [2.0, 0.6, 0, 0, 0, 0, 0, 0, 0, 0, 1]}  # two actions of version 8, gap 0.3 each
    found = correction_metrics([one], RolloutCorrection(), 8, StubEngine(others=others))
    assert found["rollout_gap"] == pytest.approx(0.2) and found["staleness"] == 2
    plain = replace(one, sampled_log_probs=None, version=None)
    assert correction_metrics([plain], RolloutCorrection(), 8, SimpleNamespace()) == {}
