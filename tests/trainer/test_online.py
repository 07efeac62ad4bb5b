"""Episodes: which prompts, which windows, at what temperature, and where a stopped run goes on.
Models are stubs."""

import json
import os
import signal
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from coati.dataset.load.loader import EvaluationLoader, GlobalBatchLoader
from coati.experience_buffer.buffer import NaiveExperienceBuffer
from coati.experience_maker.experience import Experience, masks
from coati.experience_maker.kl_controller import KLController
from coati.experience_maker.rollout_batch import RolloutBatch
from coati.experience_maker.rollouts.pending_rollouts import PendingRollouts, RolloutsLost
from coati.models.generation.loop import Generated
from coati.parallel.checkpoint import RunningState
from coati.parallel.objective import NonFiniteLoss, Step
from coati.parallel.step_work import StepClock
from coati.rewards.responses import Responses
from coati.trainer.callbacks import Callback, StopTraining
from coati.trainer.monitor.rl_checks import RLChecks
from coati.trainer.monitor.rl_reporter import RLReporter, current_names
from coati.trainer.online import Episodes, OLTrainer
from coati.trainer.policy_objective import PolicySettings
from coati.trainer.schedule import RunSchedule
from tests.experience_maker.stubs import StubEngine

ASSETS = {"actor": None, "critic": None}
OLDER = Path(__file__).parents[1] / "data" / "ppo_state_0.1.0.json"
NO_MAKER = {"maker": {"answered": 0}}  # the stub's state instead of the stored one


class Rows:
    """Prompts of one token each, their own number."""

    column_names = ("input_ids", "seq_length")

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key):
        return (
            np.ones(self.count, dtype=np.int64)
            if isinstance(key, str)
            else {"input_ids": [key + 10]}
        )


class Collate:
    def __call__(self, rows):
        ids = torch.tensor([row["input_ids"] for row in rows])
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "gt_answer": [None] * len(rows),
        }

    def blank(self, row):
        return row


class Maker:
    """Answers a prompt n with two tokens of n; its state is how many it has answered."""

    scores_beside = False

    def __init__(self, stop_at: int | None = None) -> None:
        self.settings, self.kl = SimpleNamespace(num_generations=1), KLController(0.0)
        self.answered, self.calls, self.judged, self.stop_at = 0, [], [], stop_at
        self.published: list[int] = []
        self.events: list[tuple] = []
        self.lost_at: int | None = None
        self.clock = StepClock()

    def engines(self):
        return []

    def publish(self, version):
        self.published.append(version)
        self.events.append(("publish", version))

    def ask(self, batch, rows, episode, temperature):
        self.calls.append((episode, batch["input_ids"].flatten().tolist(), list(rows), temperature))
        if len(self.calls) == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        self.events.append(("ask", episode))
        ids = batch["input_ids"]
        lengths = torch.ones(len(ids))
        answer: Future[Generated] = Future()
        if episode == self.lost_at:
            answer.set_exception(RolloutsLost("no server answers"))
        else:
            answer.set_result(Generated(ids, lengths, lengths, 1, version=self.published[-1]))
        pending = PendingRollouts(batch, list(rows), 1, temperature, [answer])
        return replace(pending, prompts=batch | {"episode": episode})

    def make_experience(self, pending):
        version = pending.result().version
        self.events.append(("collect", pending.prompts["episode"], version))
        self.answered += len(pending.prompts["input_ids"])
        return self.rollout_and_score(
            pending.prompts, pending.sample_index, pending.prompts["episode"], pending.temperature
        )

    def rollout_and_score(self, batch, rows, episode, temperature):
        self.judged.append(episode)
        ids, count = batch["input_ids"], len(batch["input_ids"])
        attention, actions = masks(batch["attention_mask"], torch.full((count,), 2), 2)
        numbers = ids.expand(count, 2).float() / 100
        made = Experience(
            torch.cat([ids, ids, ids], 1),
            attention,
            actions,
            -numbers,
            numbers[:, 0],
            torch.tensor(list(rows)),
            kl=numbers,
            values=numbers,
            advantages=numbers,
            returns=numbers,
        )
        responses = Responses(["p"] * count, ["r"] * count, lengths=[2] * count)
        samples = {
            "reward": made.reward,
            "approx_kl": made.reward,
            "response_length": torch.full((count,), 2.0),
            "stop_rate": torch.ones(count),
        }
        return RolloutBatch(made, responses, {}, samples, {"rollout": 1.0, "scoring": 0.5})

    def finalize_advantages(self, collected):
        return [each.experience for each in collected], {"reward_std": 1.0}

    def state_dict(self):
        return {"answered": self.answered}

    def load_state_dict(self, state):
        self.answered = state["answered"]


class SlowMaker(Maker):
    """Its scores wait for something else: ``events`` are what is asked, begins, and is finished."""

    scores_beside = True

    def __init__(self, at_once: bool) -> None:
        super().__init__()
        self.rollout = SimpleNamespace(at_once=at_once)

    def begin_experience(self, pending):
        self.events.append(("begin", pending.sample_index))
        return self.make_experience(pending)

    def finish_experience(self, batch):
        self.events.append(("finish", batch.experience.sample_index.tolist()))
        return batch


class Engine(StubEngine):
    """Writes down the steps it is asked for; ``stop_at``: SIGTERM comes within that one."""

    def __init__(self, stop_at: int | None = None, nan_at: int | None = None) -> None:
        super().__init__()
        self.steps, self.stop_at, self.nan_at = [], stop_at, nan_at

    def train_step(self, window, hooks, stop=False, *, weight=1.0, aux_losses=()):
        rows = sorted(int(row[0]) for batch in window for row in batch["input_ids"])
        first = getattr(hooks, "first_pass", None)
        beside = [
            (part.weight, int(part.micro_batches[0]["input_ids"][0, 0])) for part in aux_losses
        ]
        self.steps.append((rows, getattr(hooks, "temperature", None), first, weight, beside))
        if len(self.steps) == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        if len(self.steps) == self.nan_at:
            raise NonFiniteLoss("the loss of this step is nan")
        return Step(len(self.steps) / 10, len(rows), stop=stop, aux_losses=[0.5] * len(aux_losses))


def loader(count: int = 10, batch: int = 2, steps: int = 2) -> GlobalBatchLoader:
    return GlobalBatchLoader(
        Rows(count), Collate(), batch_size=batch, accumulation_steps=steps, seed=3
    )


def trainer(actor=None, maker=None, critic=None, **changes) -> OLTrainer:
    """5 episodes of 4 prompts, each trained on twice in 2 windows."""
    episodes = Episodes(5, 2, 2, lambda episode: 1 - episode / 10, seed=1, sample_interval=0)
    if critic is not None:
        changes["critic"] = critic
    return OLTrainer(
        actor or Engine(),
        maker or Maker(),
        NaiveExperienceBuffer(2),
        episodes,
        assets=ASSETS,
        **changes,
    )


def prompts_of(maker: Maker) -> list[int]:
    return [prompt for _, batch, _, _ in maker.calls for prompt in batch]


def test_episodes_go_through_the_epochs():
    made = trainer()
    made.run(loader())
    seen, windows = prompts_of(made.maker), loader()
    places = ((0, 0), (0, 4), (1, 0), (1, 4), (2, 0))
    expected = [row for place in places for row in windows.rows_at(*place)]
    assert [prompt - 10 for prompt in seen] == expected
    assert made.state.epoch == 2 and made.state.sample_start_index == 4 and made.state.step == 20
    # Of each episode: number, indices of the responses, temperature.
    assert [(call[0], call[2]) for call in made.maker.calls][:3] == [
        (0, [0, 2]),
        (0, [1, 3]),
        (1, [0, 2]),
    ]
    assert [call[3] for call in made.maker.calls] == [
        1 - episode / 10 for episode in range(5) for _ in range(2)
    ]


def test_every_pass_trains_on_every_response_once():
    made = trainer()
    made.run(loader())
    for episode in range(5):
        steps = made.engine.steps[4 * episode : 4 * episode + 4]
        collected = sorted(prompts_of(made.maker)[4 * episode : 4 * episode + 4])
        assert sorted(steps[0][0] + steps[1][0]) == sorted(steps[2][0] + steps[3][0]) == collected
        assert [step[1] for step in steps] == [1 - episode / 10] * 4
        assert [step[2] for step in steps] == [True, False, False, False]


@pytest.mark.parametrize(
    ("at_once", "order"),
    [
        (True, ["ask", "begin", "ask", "begin", "finish", "finish"]),
        (False, ["ask", "ask", "begin", "begin", "finish", "finish"]),
    ],
)
def test_slow_rewards_of_one_batch_run_while_the_next_is_sampled(at_once, order):
    """By the model itself, or elsewhere, where all batches are asked for first."""
    made = trainer(maker=SlowMaker(at_once))
    made.run(loader())
    plain = trainer()
    plain.run(loader())
    events = [event for event in made.maker.events if event[0] in ("ask", "begin", "finish")]
    assert [event[0] for event in events] == order * 5
    begun = [event[1] for event in events if event[0] == "begin"]
    assert [event[1] for event in events if event[0] == "finish"] == begun  # in the same order
    assert made.engine.steps == plain.engine.steps


def test_the_critic_learns_from_the_same_windows():
    critic = Engine()
    made = trainer(critic=critic)
    made.run(loader())
    assert [step[0] for step in critic.steps] == [step[0] for step in made.engine.steps] and len(
        critic.steps
    ) == 20


def test_supervised_rows_beside_the_policy():
    made, ptx = trainer(ptx_coef=0.25), loader(7, 1, 2)
    made.run(loader(), ptx=ptx)
    weights = {(step[3], step[4][0][0]) for step in made.engine.steps}
    assert weights == {(0.75, 0.25)}
    rows = [row for step in range(20) for row in ptx.rows_at(step // 3, 2 * (step % 3))[:1]]
    assert [
        step[4][0][1] - 10 for step in made.engine.steps
    ] == rows  # three windows an epoch, epoch after epoch


def test_evaluations_are_due_and_count_for_nothing():
    made = trainer(schedule=RunSchedule(eval_interval=2))
    evaluation = EvaluationLoader(Rows(3), Collate(), batch_size=2)
    made.run(loader(), evaluation)
    seen = [episode for episode in made.maker.judged if episode > 5]
    assert len(seen) == 2 * 4  # before, after 2, 4 and 5 episodes, in two batches
    assert made.maker.answered == 20
    assert made.last_evaluation["eval/reward"] == pytest.approx(
        0.11
    )  # prompts 10, 11, 12; the blank one left out


def test_what_is_logged(tmp_path):
    made = trainer(critic=Engine(), schedule=RunSchedule(str(tmp_path), log_interval=2))
    made.run(loader())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 5] and "memory/rank_0_peak_mb" in lines[-1]
    two = prompts_of(made.maker)[:8]
    assert lines[0]["train/reward"] == pytest.approx(sum(two) / 800)
    assert lines[0]["train/policy_loss"] == pytest.approx(sum(range(1, 9)) / 80)
    assert (
        lines[0]["train/seconds_rollout"] == 2.0 and lines[0]["train/tokens_per_second"] == 16 / 4
    )
    assert {
        "train/value_loss",
        "train/distinct_2",
        "train/kl_coef",
        "train/optimizer_steps",
    } <= lines[0].keys()


def test_tokens_that_are_sampled_ahead_are_of_the_whole_time():
    """Little is waited for them, which says nothing of how fast they are sampled."""
    made = trainer()
    rates = []
    for ahead in (False, True):
        reporter = RLReporter(made.log, None, {}, made.throughput, ahead)
        reporter._counts |= {"tokens": 60.0, "rollout": 0.5, "seconds": 20.0}
        made.log.meter.add("_seconds_update", 1.0)
        rates.append(reporter.take_metrics(steps_per_episode=1)["tokens_per_second"])
    assert rates == [120.0, 3.0]


def test_refilling_and_publishing_are_time_of_the_episode():
    made = trainer()
    reporter = made.reporter
    reporter.add_rollouts([], {"seconds_refill": 3.0}, True)
    reporter.add_step(Step(0.5, 1, tokens=16), None, 1.0)
    made.maker.publish = lambda version: time.sleep(0.05)
    made._publish()
    found = reporter.take_metrics(steps_per_episode=1)
    assert 16 / 5 < found["trained_tokens_per_second"] <= 16 / 4.05


def test_samples_are_shown_and_kept_every_few_episodes(tmp_path, capsys):
    made = trainer(schedule=RunSchedule(str(tmp_path)))
    made.episodes = replace(made.episodes, sample_interval=2)
    made.run(loader())
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in samples] == [1, 1, 3, 3, 5, 5]
    last = prompts_of(made.maker)[2] / 100  # of the first episode's second batch
    assert samples[0] == {
        "step": 1,
        "prompt": "p",
        "response": "r",
        "reward": pytest.approx(last),
        "KL": pytest.approx(last),
    }
    shown = capsys.readouterr()
    assert [n for n in range(1, 6) if f"episode {n}: samples" in shown.out + shown.err] == [1, 3, 5]


def stopped_at(place: dict, tmp_path, monkeypatch) -> tuple:
    """A run that SIGTERM stops, what it saved, and the one that goes on."""
    saved = {}

    def save(folder, models, state, buffer_state=None, rollouts=None):
        saved.update(
            state=json.loads(json.dumps(vars(state))), buffer_state=buffer_state, models=set(models)
        )
        return tmp_path

    monkeypatch.setattr("coati.trainer.online.save_models", save)
    first = trainer(place.get("actor"), place.get("maker"), schedule=RunSchedule(str(tmp_path)))
    first.run(loader())
    assert first.stopped_early
    second = trainer(
        schedule=RunSchedule(str(tmp_path)),
        state=RunningState(**saved["state"]),
        buffer_state=saved["buffer_state"],
    )
    second.run(loader())
    return first, saved, second


def test_stopped_while_collecting_the_episode_starts_again(tmp_path, monkeypatch):
    whole = trainer()
    whole.run(loader())
    # In the first of the two batches of the third episode; the second batch is not asked for.
    first, saved, second = stopped_at({"maker": Maker(stop_at=5)}, tmp_path, monkeypatch)
    assert (
        saved["buffer_state"] is None and first.maker.answered == 8 and len(first.engine.steps) == 8
    )
    assert (
        second.maker.calls == whole.maker.calls[4:]
        and second.maker.answered == whole.maker.answered
    )
    assert first.engine.steps + second.engine.steps == whole.engine.steps


@pytest.mark.parametrize("at", [9, 10, 11])
def test_stopped_between_updates_the_rest_of_the_episode_follows(tmp_path, monkeypatch, at):
    whole = trainer()
    whole.run(loader())
    first, saved, second = stopped_at({"actor": Engine(stop_at=at)}, tmp_path, monkeypatch)
    steps = len(first.engine.steps)
    assert steps == at + 1 and first.state.step == steps
    assert (saved["buffer_state"] is None) == (steps == 12)  # the episode was over: nothing is kept
    assert first.engine.steps + second.engine.steps == whole.engine.steps
    assert first.maker.calls + second.maker.calls == whole.maker.calls


def test_other_windows_start_the_episode_anew(tmp_path, monkeypatch, capsys):
    first, saved, _ = stopped_at({"actor": Engine(stop_at=9)}, tmp_path, monkeypatch)
    state = RunningState(**saved["state"])
    episodes = Episodes(5, 2, 4)
    other = OLTrainer(
        Engine(),
        Maker(),
        NaiveExperienceBuffer(1),
        episodes,
        assets=ASSETS,
        state=state,
        buffer_state=saved["buffer_state"],
    )
    assert len(other.buffer) == 0 and other._position == (0, 0)
    assert "that episode starts over" in capsys.readouterr().err


def test_an_episode_goes_on_as_it_was_sampled(tmp_path, monkeypatch):
    """Another temperature and number of prompts from the next episode on: log-probs of the
    responses at hand are of their own temperature, and their prompts alone count as used."""
    first, saved, _ = stopped_at({"actor": Engine(stop_at=9)}, tmp_path, monkeypatch)
    other = OLTrainer(
        Engine(),
        Maker(),
        NaiveExperienceBuffer(2),
        Episodes(4, 2, 2, lambda episode: 0.3, seed=1, sample_interval=0),
        assets=ASSETS,
        state=RunningState(**saved["state"]),
        buffer_state=saved["buffer_state"],
    )
    other.run(loader(batch=2, steps=1))
    temperatures = [step[1] for step in other.engine.steps]
    assert first.engine.steps[-1][1] == pytest.approx(0.8)  # of the third episode
    assert temperatures[:2] == pytest.approx([0.8] * 2) and set(temperatures[2:]) == {0.3}
    whole = trainer()
    whole.run(loader())
    assert prompts_of(other.maker) == prompts_of(whole.maker)[12:14]


def test_an_episode_without_what_the_loss_needs_starts_over(tmp_path, monkeypatch, capsys):
    _, saved, _ = stopped_at({"actor": Engine(stop_at=9)}, tmp_path, monkeypatch)
    other = trainer(
        policy=PolicySettings(kl_coef=0.1),
        state=RunningState(**saved["state"]),
        buffer_state=saved["buffer_state"],
    )
    assert len(other.buffer) == 0 and other._position == (0, 0)
    said = capsys.readouterr().err
    assert "no log-probs of the reference, which --kl_in loss needs: that episode" in said


def test_the_state_of_an_older_release_under_todays_names():
    """tests/data/ppo_state_0.1.0.json: of a PPO run that was stopped inside its second episode, by
    the release that called the metric entropy and the maker's state normalisation."""
    stored = json.loads(OLDER.read_text())
    made = trainer(
        critic=Engine(), checks=RLChecks(), state=RunningState(trainer=stored | NO_MAKER)
    )
    assert made.episode == 1 and made._ptx_at == [1, 4]
    report = made.log.meter.report()
    total, count = stored["meter"][0]["entropy"]
    assert report["sampled_entropy"] == total / count and "entropy" not in report
    assert made.first_evaluation == stored["evaluated"]["first"]
    history = made.reporter.checks.state_dict()["history"]
    assert "sampled_entropy" in history["first"] and "entropy" not in history["first"]


def test_metrics_that_the_checks_remember_come_back_under_todays_names():
    history = {"first": {"entropy": [2.0]}, "recent": {"entropy": [1.0]}, "counts": {"entropy": 9}}
    state = {"signs": {"history": history | {"best": None}, "said": {}}}
    found = current_names(state)["signs"]["history"]
    assert found["first"] == {"sampled_entropy": [2.0]}
    assert found["recent"] == {"sampled_entropy": [1.0]}
    assert found["counts"] == {"sampled_entropy": 9} and found["best"] is None


def test_a_loss_that_is_not_finite_names_the_episode():
    made = trainer(Engine(nan_at=7))
    with pytest.raises(
        NonFiniteLoss, match=r"nan \(episode 2, optimizer step 7\); nothing was saved"
    ):
        made.run(loader())


def test_the_report_of_a_run_that_fails_says_so(tmp_path):
    made = trainer(Engine(nan_at=7), schedule=RunSchedule(str(tmp_path)))
    with pytest.raises(NonFiniteLoss):
        made.run(loader())
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "failed at episode 1" in report
    assert "nan (episode 2, optimizer step 7)" in report
    assert "could not be written" not in (tmp_path / "events.jsonl").read_text()


def test_a_rehearsal_is_one_episode_and_two_steps(tmp_path):
    made = trainer(schedule=RunSchedule(str(tmp_path)))
    metrics = made.rehearse(loader())
    assert len(made.maker.calls) == 2 and len(made.engine.steps) == 2
    assert [step[2] for step in made.engine.steps] == [True, False]
    assert metrics["policy_loss"] == pytest.approx(0.15) and not list(tmp_path.iterdir())


def test_a_kl_target_moves_the_coefficient_in_the_loss_too():
    used, maker = [], Maker()

    class Watched(Engine):
        def train_step(self, window, hooks, *others, **named):
            used.append(hooks.kl_coef)
            return super().train_step(window, hooks, *others, **named)

    maker.kl = KLController(0.5, target=1.0, horizon=100)
    trainer(Watched(), maker, policy=PolicySettings(kl_coef=0.5)).run(loader(4, 2, 2))
    assert used == [0.5] * 20  # the stub's phases say nothing of KL
    maker.kl.kl_coef = 0.25
    used.clear()
    trainer(Watched(), maker, policy=PolicySettings(kl_coef=0.5)).run(loader(4, 2, 2))
    assert used == [0.25] * 20
    used.clear()
    trainer(Watched(), maker).run(loader(4, 2, 2))  # KL in the reward: nothing of it in the loss
    assert used == [0.0] * 20


class Told(Callback):
    """Writes down the episode and step of each event; asks to stop at the optimizer step
    ``stop_at``."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.events: list[tuple] = []
        self.stop_at = stop_at

    def on_train_begin(self, trainer):
        self.events.append(("begin", trainer.episode))

    def on_step(self, trainer, metrics):
        self.events.append(("step", trainer.state.step, metrics))
        if trainer.state.step == self.stop_at:
            raise StopTraining

    def on_save(self, trainer, path):
        self.events.append(("save", path))

    def on_train_end(self, trainer):
        self.events.append(("end", trainer.episode, trainer.stopped_early))


def test_a_callback_ends_the_run_after_the_episode(tmp_path, monkeypatch):
    monkeypatch.setattr("coati.trainer.online.save_models", lambda *_: tmp_path / "saved")
    told = Told(stop_at=6)
    one = trainer(Engine(), callbacks=[told], schedule=RunSchedule(str(tmp_path)))
    one.run(loader())
    steps = [event[1:] for event in told.events if event[0] == "step"]
    # 4 steps an episode, whose loss the stub makes a tenth of their number
    assert [step for step, _ in steps] == list(range(1, 9))
    assert [metrics["train/policy_loss"] for _, metrics in steps] == [n / 10 for n in range(1, 9)]
    assert told.events[0] == ("begin", 0)
    assert told.events[-2:] == [("save", tmp_path / "saved"), ("end", 2, True)]


def test_an_error_of_a_callback_is_the_runs():
    class Broken(Told):
        def on_step(self, trainer, metrics):
            raise KeyError("mine")

    broken = Broken()
    with pytest.raises(KeyError, match="mine"):
        trainer(callbacks=[broken]).run(loader())
    assert broken.events == [("begin", 0)]  # and no end
    with pytest.raises(TypeError, match="callbacks: .* is no coati.Callback"):
        trainer(callbacks=[print])


def test_evaluations_that_do_not_improve_end_the_run_after_an_episode(capsys):
    """The reward of the held-out prompts is the same at each evaluation."""
    made = trainer(schedule=RunSchedule(eval_interval=1, early_stopping_patience=2))
    made.run(loader(), EvaluationLoader(Rows(3), Collate(), batch_size=2))
    assert made.episode == 3 and not made.stopped_early
    said = capsys.readouterr().err
    assert "reward has not improved in 2 evaluations" in said
    assert "the run ends after episode 3" in said


def test_the_length_of_a_resumed_run_follows_what_is_left():
    """Steps done, and those of the episodes that are left, as they are divided now."""
    episodes = Episodes(num_episodes=5, num_update_steps=2, steps_per_pass=3)
    assert episodes.total_steps == 30
    assert episodes.total_steps_from(RunningState(), inside=False) == 30
    done = RunningState(step=12, trainer={"episode": 2, "position": [0, 0]})
    assert episodes.total_steps_from(done, inside=False) == 30
    shorter = replace(episodes, num_update_steps=1)
    assert shorter.total_steps_from(done, inside=False) == 12 + 3 * 3
    inside = RunningState(step=16, trainer={"episode": 2, "position": [1, 1]})
    assert episodes.total_steps_from(inside, inside=True) == 30
    over = replace(episodes, num_episodes=2)
    assert over.total_steps_from(done, inside=False) == 12
