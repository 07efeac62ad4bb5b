"""The loop and the SFT hooks with an engine that only counts: what is logged, evaluated, saved, and
when it ends."""

import json
import signal
from dataclasses import asdict

import pytest
import torch

from coati.dataset.load.loader import GlobalBatchLoader
from coati.parallel.checkpoint import RunningState
from coati.parallel.engine import NonFiniteLoss, Step
from coati.parallel.weights import ModelAssets
from coati.trainer import RunSchedule, SFTTrainer
from coati.trainer.global_batches import GroupedDataLoader, total_steps
from coati.trainer.run_report.run_summary import status_of
from coati.trainer.stop import GracefulStop
from tests.trainer.fake_engine import FakeEngine


class CountingEngine(FakeEngine):
    """Step k has loss k over k units and gradient norm 10 k; ``at[k]`` is called in step k."""

    def __init__(self, at=None) -> None:
        super().__init__()
        self.steps, self.at = 0, at or {}

    def train_step(self, window, hooks, stop):
        self.steps += 1
        if self.steps in self.at:
            self.at[self.steps]()
        return Step(
            float(self.steps), self.steps, tokens=10, stop=stop, grad_norm=10.0 * self.steps
        )

    def evaluate(self, batches, hooks):
        return Step(2.0, 7)


class Rows:
    column_names = ("seq_length",)

    def __len__(self) -> int:
        return 7

    def __getitem__(self, key):
        return [3] * 7 if key == "seq_length" else {"index": key}


@pytest.fixture
def made(tmp_path, monkeypatch):
    """``made(plan fields..., at=, state=)``: trainer, its saves; two windows of 3 rows an epoch,
    two epochs."""

    def make(at=None, state=None, **plan):
        trainer = SFTTrainer(
            engine=CountingEngine(at),
            max_epochs=2,
            schedule=RunSchedule(str(tmp_path), **plan),
            state=state,
            assets=ModelAssets(config=None),
        )
        saves: list[tuple[int, int, int]] = []
        where = trainer.state
        monkeypatch.setattr(
            trainer,
            "save",
            lambda: saves.append((where.step, where.epoch, where.sample_start_index)),
        )
        return trainer, saves

    return make


def fit(trainer, evaluate: bool = False) -> None:
    trainer.fit(
        GlobalBatchLoader(Rows(), lambda rows: rows, batch_size=3), [None] if evaluate else None
    )


def logged(tmp_path, name: str) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line[name]) for line in lines if name in line]


def test_the_logged_loss_weighs_units(made, tmp_path):
    """Steps 1 and 2: (1 x 1 + 2 x 2) / 3; steps 3 and 4: (9 + 16) / 7."""
    trainer, _ = made(log_interval=2)
    fit(trainer)
    assert logged(tmp_path, "train/loss") == [(2, 5 / 3), (4, 25 / 7)]
    assert logged(tmp_path, "train/supervised_tokens") == [(2, 3.0), (4, 7.0)]
    assert logged(tmp_path, "train/grad_norm") == [(2, 20.0), (4, 40.0)]
    assert logged(tmp_path, "epoch") == [(2, 0), (4, 1)]


@pytest.mark.parametrize(
    "plan, evaluated",
    [
        ({}, [0, 2, 4]),
        ({"eval_interval": 3}, [0, 3, 4]),
        ({"eval_interval": 4}, [0, 4]),
        ({"eval_interval": 0}, [0, 4]),
        ({"max_steps": 3}, [0, 2, 3]),
    ],
)
def test_evaluation_at_the_start_when_due_and_at_the_end_once(made, tmp_path, plan, evaluated):
    trainer, _ = made(**plan)
    fit(trainer, evaluate=True)
    assert [step for step, _ in logged(tmp_path, "eval/loss")] == evaluated
    assert trainer.last_evaluation["eval/perplexity"] == pytest.approx(7.389056)


def test_positions_that_are_saved(made):
    trainer, saves = made(save_interval=1)
    fit(trainer)
    assert saves == [(1, 0, 3), (2, 0, 6), (3, 1, 3), (4, 1, 6)]


def test_a_resumed_run_does_the_rest(made):
    trainer, saves = made(
        save_interval=1, state=RunningState(epoch=0, step=2, sample_start_index=6)
    )
    fit(trainer)
    assert trainer.engine.steps == 2 and saves == [(3, 1, 3), (4, 1, 6)]


def test_what_was_evaluated_before_is_not_evaluated_again(made, tmp_path):
    evaluated = {"at": 4, "first": {"eval/loss": 9.0}, "last": {"eval/loss": 8.0}}
    state = RunningState(epoch=1, step=4, sample_start_index=6, trainer={"evaluated": evaluated})
    trainer, _ = made(state=state)
    fit(trainer, evaluate=True)
    assert trainer.engine.steps == 0 and logged(tmp_path, "eval/loss") == []
    assert (trainer.first_evaluation, trainer.last_evaluation) == (
        {"eval/loss": 9.0},
        {"eval/loss": 8.0},
    )


class SamplingEngine(CountingEngine):
    """Begins at step ``done`` + 1, as a resumed run does; step k has the samples 0.1 k and 0.3
    k."""

    def __init__(self, done: int = 0) -> None:
        super().__init__()
        self.steps = done

    def train_step(self, window, hooks, stop):
        step = super().train_step(window, hooks, stop)
        step.metrics = {
            "reward": [torch.tensor([0.1 * self.steps]), torch.tensor([0.3 * self.steps])]
        }
        return step


def test_samples_not_reported_yet_are_part_of_a_checkpoint(tmp_path, monkeypatch):
    """A report at step 3, a save after step 2: the resumed run logs the line of the uninterrupted
    one."""
    stored = {}

    def keep(save_dir, engine, assets, state):
        stored[state.step] = json.loads(json.dumps(asdict(state)))

    monkeypatch.setattr("coati.trainer.base.save_checkpoint", keep)
    lines = {}
    for name, state in (("whole", {}), ("resumed", None)):
        state = RunningState(**(stored[2] if state is None else state))
        plan = RunSchedule(str(tmp_path / name), save_interval=2, log_interval=3)
        trainer = SFTTrainer(
            engine=SamplingEngine(state.step),
            max_epochs=2,
            schedule=plan,
            state=state,
            assets=ModelAssets(config=None),
        )
        fit(trainer)
        lines[name] = [
            (step, loss, reward)
            for (step, loss), (_, reward) in zip(
                logged(tmp_path / name, "train/loss"),
                logged(tmp_path / name, "train/reward"),
                strict=True,
            )
        ]
    assert lines["whole"] == lines["resumed"] == [(3, 14 / 6, pytest.approx(0.4))]


def test_a_signal_ends_after_the_step_with_a_save(made):
    trainer, saves = made(at={2: lambda: signal.raise_signal(signal.SIGTERM)})
    fit(trainer)
    assert trainer.engine.steps == 3 and saves == [(3, 1, 3)] and trainer.stopped_early


def test_a_signal_in_the_last_step_finds_the_run_at_its_end(made):
    trainer, _ = made(at={3: lambda: signal.raise_signal(signal.SIGTERM)})
    fit(trainer)
    assert trainer.engine.steps == 4 and not trainer.stopped_early


def test_what_the_loss_is_a_mean_of_is_logged_by_its_name(made, tmp_path):
    trainer, _ = made(log_interval=2)
    trainer.unit_name = "pairs"  # as DPO's
    fit(trainer)
    assert logged(tmp_path, "train/pairs") == [(2, 3.0), (4, 7.0)]
    assert not logged(tmp_path, "train/supervised_tokens")


def test_a_loss_that_is_not_finite_names_step_and_rows(made, tmp_path):
    def fail():
        raise NonFiniteLoss("the loss of this step is nan")

    trainer, saves = made(at={3: fail}, save_interval=1)
    with pytest.raises(
        NonFiniteLoss, match=r"is nan \(step 3, epoch 1, rows \d, \d, \d of --dataset\).*untouched"
    ):
        fit(trainer)
    assert saves[-1] == (2, 0, 6)
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "failed at step 2" in report and "is nan (step 3, epoch 1, rows" in report


def test_the_report_is_written_at_each_evaluation_and_at_the_end(made, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(
        "coati.trainer.run_report.run_page.run_page",
        lambda run, live: written.append((run.last_step, status_of(run, live).kind)) or "",
    )
    trainer, _ = made(eval_interval=3)
    fit(trainer, evaluate=True)
    assert written == [
        (0, "running"),  # at the start
        (0, "running"),
        (3, "running"),
        (4, "running"),
        (4, "finished"),
    ]


def test_a_stopped_run_says_so_in_its_report(made, tmp_path):
    trainer, _ = made(at={2: lambda: signal.raise_signal(signal.SIGTERM)})
    fit(trainer)
    assert trainer.stopped_early
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"stopped after step {trainer.state.step}" in report


def test_samples_of_an_evaluation_are_shown_and_stored(made, tmp_path, capfd):
    trainer, _ = made(eval_interval=0)
    trainer.samples = lambda engine: [("Why?", f"answer {engine.steps}")]
    fit(trainer, evaluate=True)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert rows == [
        {"step": 0, "prompt": "Why?", "response": "answer 0"},
        {"step": 4, "prompt": "Why?", "response": "answer 4"},
    ]
    shown = capfd.readouterr()
    assert "answer 4" in shown.out + shown.err


def test_a_plain_loader_works_too(made):
    trainer, saves = made(save_interval=2)
    trainer.accumulation_steps = 2
    trainer.fit([{"index": i} for i in range(5)], None)
    assert trainer.engine.steps == 4 and saves == [(2, 0, 4), (4, 1, 4)]
    with pytest.raises(
        ValueError, match="the loader has 1 batches, fewer than the 2 of one optimizer step"
    ):
        GroupedDataLoader([{}], 2)


@pytest.mark.parametrize(
    "state, window, steps",
    [
        ({}, 3, 4),  # two windows of 3 in each of two epochs of 7 rows
        ({"step": 1, "sample_start_index": 3}, 3, 4),
        ({"step": 1, "sample_start_index": 3}, 1, 1 + 4 + 7),
        ({"step": 5, "epoch": 1, "sample_start_index": 6}, 3, 5),
        ({"step": 12, "epoch": 1, "sample_start_index": 1}, 6, 13),
        ({"step": 9, "epoch": 2}, 3, 9),
    ],
)
def test_steps_in_all(state, window, steps):
    assert total_steps(RunningState(**state), lambda epoch: 7, window, max_epochs=2) == steps


def test_max_steps_counts_from_the_start_of_the_run():
    assert (
        total_steps(
            RunningState(step=1, sample_start_index=3),
            lambda epoch: 7,
            1,
            max_epochs=2,
            max_steps=5,
        )
        == 5
    )


BATCH = {
    "input_ids": torch.tensor([[5, 6, 2, 2], [7, 2, 8, 2]]),  # 2 is end and padding
    "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
    "labels": torch.tensor([[-100, 6, 2, -100], [-100, -100, -100, 2]]),
}


def test_the_objective(made):
    trainer, _ = made()
    assert (
        trainer.objective.prepare(BATCH) is BATCH and int(trainer.objective.num_terms(BATCH)) == 3
    )
    loss, metrics = trainer.objective.loss(torch.tensor([-1.0, -2.0, -0.5]), BATCH)
    assert float(loss) == 3.5 and metrics == {}
    assert trainer.evaluation_metrics(Step(1e9, 1))["perplexity"] < float("inf")


def test_without_the_loss_mask_all_but_padding_is_supervised(made):
    trainer, _ = made()
    trainer.objective.apply_loss_mask = False
    batch = trainer.objective.prepare(BATCH)
    assert batch["labels"].tolist() == [[5, 6, 2, -100], [7, 2, 8, 2]]
    assert int(trainer.objective.num_terms(batch)) == 5  # nothing predicts the first token of a row


def test_the_keywords_of_the_reference_are_taken():
    assets = ModelAssets(config=None)
    trainer = SFTTrainer(
        engine=CountingEngine(),
        max_epochs=3,
        accumulation_steps=2,
        start_epoch=1,
        save_interval=5,
        save_dir="d",
        assets=assets,
    )
    assert (trainer.state.epoch, trainer.schedule.save_interval, trainer.schedule.save_dir) == (
        1,
        5,
        "d",
    )


def test_the_second_interrupt_does_not_wait(capsys):
    before = signal.getsignal(signal.SIGINT)
    with GracefulStop() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert capsys.readouterr().err.count("SIGINT: finishing this step, then saving") == 1


def test_in_packs_no_token_is_asked_for_the_first_of_the_next_row():
    """Rows 5 6 and 7 in one pack, and padding: of all tokens only 6 has one of its row before
    it."""
    trainer = SFTTrainer(
        engine=CountingEngine(), assets=ModelAssets(config=None), apply_loss_mask=False
    )
    batch = {
        "input_ids": [[5, 6, 7, 2]],
        "attention_mask": [[1, 1, 1, 0]],
        "position_ids": [[0, 1, 0, 0]],
    }
    labels = trainer.objective.prepare(
        {name: torch.tensor(values) for name, values in batch.items()}
    )["labels"]
    assert labels.tolist() == [[-100, 6, -100, -100]]


def test_evaluations_that_do_not_improve_end_the_run(made, tmp_path, capsys):
    """The loss is 2.0 at every evaluation: the first after a step is the best, one more is none
    better."""
    trainer, saves = made(eval_interval=1, early_stopping_patience=1, save_interval=2)
    fit(trainer, evaluate=True)
    assert trainer.engine.steps == 2 and saves == [(2, 0, 6)]
    assert not trainer.stopped_early  # so the final model is saved
    said = capsys.readouterr().err
    assert said.count("early stopping: loss has not improved in one evaluation") == 1
    assert "the best was 2.0000 at step 1" in said and "the run ends after step 2" in said
    events = (tmp_path / "events.jsonl").read_text(encoding="utf-8")
    assert "early stopping" in events and '"finished"' in events


def test_a_run_that_ended_early_ends_again_and_with_more_patience_goes_on(made):
    counted = {"metric": "loss", "best": 2.0, "best_at": 1, "count": 1}

    def state() -> RunningState:
        return RunningState(step=2, sample_start_index=6, trainer={"early_stopping": counted})

    trainer, _ = made(eval_interval=1, early_stopping_patience=1, state=state())
    fit(trainer, evaluate=True)
    assert trainer.engine.steps == 0
    trainer, _ = made(eval_interval=1, early_stopping_patience=2, state=state())
    fit(trainer, evaluate=True)
    assert trainer.engine.steps == 1


def test_a_signal_in_the_step_that_ends_a_run_early_finds_it_at_its_end(made):
    stop = {2: lambda: signal.raise_signal(signal.SIGTERM)}
    trainer, _ = made(at=stop, eval_interval=1, early_stopping_patience=1)
    fit(trainer, evaluate=True)
    assert trainer.engine.steps == 2 and not trainer.stopped_early


def test_what_is_found_in_a_step_is_a_message_as_all_others(made, capfd):
    trainer, _ = made()
    trainer.diagnose = lambda step: ["warning: a finding"] if step.num_terms == 2 else []
    fit(trainer)
    out, err = capfd.readouterr()
    assert err.splitlines().count("coati: warning: a finding") == 1
    assert "a finding" not in out
