"""When evaluations that no longer improve end a run."""

import pytest

from coati.trainer.early_stopping import EarlyStopping
from coati.trainer.schedule import RunSchedule


def stopped_at(values: list[float], **given) -> int | None:
    """The step of the evaluation that ends the run; None if none does."""
    metric = given.get("metric_for_best", "loss")
    stopping = EarlyStopping(RunSchedule(**given), "loss", {})
    for step, value in enumerate(values):
        stopping.evaluated({f"eval/{metric}": value}, step)
        if stopping.exhausted:
            return step
    return None


def test_patience_counts_evaluations_without_improvement():
    values = [9.0, 3.0, 2.0, 2.5, 2.0, 1.0, 1.5, 1.5, 1.5]
    assert stopped_at(values, early_stopping_patience=3) == 8
    assert stopped_at(values, early_stopping_patience=2) == 4
    assert stopped_at(values, early_stopping_patience=1) == 3
    assert stopped_at(values) is None


def test_the_evaluation_before_training_does_not_count():
    assert stopped_at([1.0, 2.0, 1.9], early_stopping_patience=1) is None


def test_accuracy_is_better_when_it_rises():
    given = {"metric_for_best": "accuracy", "early_stopping_patience": 1}
    assert stopped_at([0.5, 0.6, 0.7, 0.7], **given) == 3


def test_less_than_the_threshold_is_no_improvement():
    values = [9.0, 3.0, 2.95, 2.9, 2.5]
    given = {"early_stopping_patience": 2}
    assert stopped_at(values, **given) is None
    assert stopped_at(values, **given, early_stopping_threshold=0.2) == 3


def test_no_number_is_no_improvement():
    assert stopped_at([1.0, float("nan"), float("nan")], early_stopping_patience=2) == 2


def test_a_resumed_run_keeps_the_count():
    schedule = RunSchedule(early_stopping_patience=3)
    values = [3.0, 1.0, 2.0, 2.0, 2.0, 2.0]
    whole = EarlyStopping(schedule, "loss", {})
    for cut in range(len(values)):
        parts = EarlyStopping(schedule, "loss", {})
        for step, value in enumerate(values[:4]):
            if step == cut:
                parts = EarlyStopping(schedule, "loss", parts.state_dict())
            parts.evaluated({"eval/loss": value}, step)
        if cut == 0:
            for step, value in enumerate(values[:4]):
                whole.evaluated({"eval/loss": value}, step)
        assert parts.state_dict() == whole.state_dict() and parts.count == 2


def test_another_metric_starts_anew():
    stored = {"metric": "loss", "best": 1.0, "best_at": 3, "count": 2}
    schedule = RunSchedule(metric_for_best="accuracy", early_stopping_patience=3)
    assert EarlyStopping(schedule, "loss", stored).state_dict() == {
        "metric": "accuracy",
        "best": None,
        "best_at": None,
        "count": 0,
    }


def test_it_says_why():
    stopping = EarlyStopping(RunSchedule(early_stopping_patience=2), "loss", {})
    for step, value in enumerate([3.0, 1.25, 2.0, 2.0]):
        stopping.evaluated({"eval/loss": value}, step)
    assert stopping.reason("step") == (
        "early stopping: loss has not improved in 2 evaluations (the best was 1.2500 at step 1; "
        "--early_stopping_patience 2)"
    )


def test_a_metric_that_is_not_there_is_named():
    stopping = EarlyStopping(
        RunSchedule(metric_for_best="bleu", early_stopping_patience=1), "loss", {}
    )
    with pytest.raises(ValueError, match="evaluations of this run give loss"):
        stopping.evaluated({"eval/loss": 1.0}, 0)
