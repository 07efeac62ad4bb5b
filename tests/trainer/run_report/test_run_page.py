"""What a run's page says, from files written by hand."""

import re

import pytest

from coati.trainer.run_report.run_files import open_run
from coati.trainer.run_report.run_page import run_page
from coati.trainer.run_report.run_summary import duration, status_of, times_of
from tests.trainer.run_report.made_runs import METRICS, STARTED, event, made_run


def text_of(page):
    """The page as it is read: no tags, no style, white space as one space."""
    body = page[page.index("<body>") : page.index("<script>")]
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


@pytest.fixture
def told(tmp_path):
    def render(live=False, **files):
        return text_of(run_page(open_run(made_run(tmp_path / "run", **files)), live))

    return render


def test_the_headline_has_method_model_data_and_numbers(told):
    text = told(events=[STARTED, event("finished", 40)])
    assert text.startswith("SFT of small-135m finished after step 40")
    assert "Supervised fine-tuning (SFT) on rows.jsonl ." in text
    assert "Started 2026-03-01 10:00:00 UTC." in text
    assert "40 / 40 steps" in text
    assert "1.625 loss, evaluation at the last (step 40)" in text
    assert "1.5 lowest of them (step 20)" in text
    assert "1,300 tokens/s, last step" in text
    assert "2.0 GiB peak memory" in text
    assert "rank 1 1,024 MiB" in text


def test_speed_and_the_parts_of_a_step(told):
    logged = [
        {"step": 10, "train/model_tflops_per_second": 0.05, "train/mfu": 0.5},
        {"step": 20, "train/seconds_forward": 1.0, "train/seconds_backward": 2.0},
        {"step": 30, "train/seconds_forward": 2.0, "train/seconds_backward": 4.0},
        {"step": 30, "train/mfu": 0.625, "train/peak_memory_mb": 900.0},
    ]
    text = told(metrics=logged)
    assert "0.05 model TFLOP/s, last step" in text
    assert "62.5% of the peak rate (MFU), last step" in text
    where = text.index("Parts of a step In the mean of what was logged, of an optimizer step.")
    assert "forward 1.5 s backward 3 s" in text[where:]
    assert "Model FLOPs utilization (MFU) share of the peak" in text
    assert "Time of the parts of a step seconds" in text
    assert "Other metrics" not in text
    assert "Parts of a step" not in told()


def test_notes_are_those_of_the_last_session(told):
    first = event("note", 12, text="mean speed: 100 tokens/s")
    last = event("note", 40, text="mean speed: 200 tokens/s")
    text = told(events=[STARTED, first, event("stopped", 12), event("resumed", 12), last])
    assert "mean speed: 200 tokens/s" in text and "100 tokens/s" not in text


def test_a_part_that_takes_no_time_is_not_written_with_an_exponent(told):
    text = told(metrics=[{"step": 1, "train/seconds_data": 3e-5, "train/seconds_forward": 0.0125}])
    assert "data under 0.001 s forward 0.0125 s" in text


def test_parts_of_an_episode_stand_behind_the_part_that_they_are_made_of(told):
    seconds = {"rollout": 4, "scoring": 3, "update": 5, "reward": 1, "reference": 2, "forward": 2.5}
    logged = {f"train/seconds_{part}": value for part, value in seconds.items()}
    text = told(metrics=[{"step": 1, "train/seconds_publish": 0.5, **logged}])
    assert (
        "rollout 4 s scoring 3 s scoring: reward 1 s scoring: reference 2 s update 5 s "
        "update: forward 2.5 s publish 0.5 s"
    ) in text


def test_curves_of_one_kind_stand_under_one_heading(told):
    text = told()
    assert text.index("Loss Loss") < text.index("Perplexity") < text.index("Learning rate")
    assert "loss, training loss, evaluation" in text
    assert "Throughput tokens/s" in text


@pytest.mark.parametrize(
    "events, live, kind, words",
    [
        ([STARTED], True, "running", "running, step 40 of 40"),
        ([STARTED], False, "unknown", "no end recorded, step 40 of 40"),
        ([STARTED, event("stopped", 12)], False, "stopped", "stopped after step 12"),
        ([STARTED, event("failed", 7, text="loss is nan")], False, "failed", "failed at step 7"),
        ([STARTED, event("stopped", 9), event("resumed", 9)], True, "running", "running, step 40"),
        ([], False, "unknown", "no end recorded"),
    ],
)
def test_the_status(tmp_path, events, live, kind, words):
    status = status_of(open_run(made_run(tmp_path, events=events)), live)
    assert status.kind == kind
    assert status.text.startswith(words)


def test_a_failed_run_says_why_first(told):
    text = told(events=[STARTED, event("failed", 7, text="NonFiniteLoss: nan (rows <3>, 4)")])
    assert "The run failed. NonFiniteLoss: nan (rows &lt;3&gt;, 4)" in text
    assert text.index("The run failed.") < text.index("Curves")


def test_a_resumed_run_says_where_and_adds_up_its_times(tmp_path):
    times = [
        event("times", 10, seconds={"training": 5.0, "evaluation": 1.0}, elapsed=7.0),
        event("times", 20, seconds={"training": 10.0, "evaluation": 2.0}, elapsed=14.0),
    ]
    later = event("times", 40, seconds={"training": 8.0}, elapsed=9.0)
    events = [STARTED, *times, event("resumed", 20), later, event("finished", 40)]
    run = open_run(made_run(tmp_path, events=events))
    assert times_of(run).elapsed == 23.0
    assert times_of(run).seconds == {"training": 18.0, "evaluation": 2.0}
    assert times_of(run).parts()[-1] == ("other", 3.0)
    page = run_page(run)
    text = text_of(page)
    assert "Resumed once, at step 20 (dotted lines in the charts)." in text
    assert "23 s of training, in 2 sessions" in text
    assert 'class="resumed" d="M' in page


def test_warnings_stand_first_and_once(told):
    warning = event("warning", 10, text="warning: the loss is still ln 2")
    again = event("warning", 20, text="warning: the loss is still ln 2")
    text = told(events=[STARTED, warning, again])
    assert "Worth a second look step 10: the loss is still ln 2 Curves" in text
    assert "No warnings." in told()


def test_samples_before_and_after_stand_side_by_side(told):
    rows = [
        {"step": 0, "prompt": "Why?", "response": "<b>no</b>", "reward": 0.25},
        {"step": 0, "prompt": "How?", "response": ""},
        {"step": 20, "prompt": "Why?", "response": "middle", "reward": 0.5},
        {"step": 40, "prompt": "Why?", "response": "because", "reward": 1.0},
    ]
    text = told(samples=rows)
    assert "prompt Why? step 0 &lt;b&gt;no&lt;/b&gt; reward 0.25 step 40 because reward 1" in text
    assert "middle" not in text
    assert "prompt How? response, step 0 empty" in text


def test_settings_that_were_given_come_first(told):
    text = told(flags_given=["lr", "dataset"])
    assert "by default: dataset rows.jsonl lr 2e-05 2 settings at their defaults" in text
    assert "settings at their defaults" not in told(coati="0.1.0")


def test_the_environment(told):
    text = told(
        coati="0.1.0",
        commit="abc123+",
        python="3.12.1",
        packages={"torch": "2.14.1"},
        cuda="13.0",
        host="node1",
        cpus=16,
        memory_gib=64.0,
        platform="Linux",
        directory="/home/me",
        devices=["H200, 141 GiB"],
        processes=[{"rank": 0, "host": "node1", "device": "H200 (cuda:0)"}],
        command="train.py --lr 1",
        variables={"NCCL_DEBUG": "INFO"},
    )
    for words in (
        "coati 0.1.0 (commit abc123+)",
        "Python 3.12.1",
        "torch 2.14.1",
        "node1, 16 CPU cores, 64.0 GiB of memory; Linux",
        "rank 0 H200 (cuda:0) on node1",
        "train.py --lr 1",
        "NCCL_DEBUG INFO",
    ):
        assert words in text


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        [{"step": 1, "train/loss": 2.0}],
        [{"step": 1, "train/loss": float("nan"), "eval/loss": float("nan")}],
        [{"step": 0, "eval/accuracy": 0.5, "eval/accuracy_low": 0.4, "eval/accuracy_high": 0.6}],
        [{"step": 3, "train/value_loss": 1e30, "train/policy_loss": -1e-30, "train/ratio_max": 1}],
    ],
)
def test_pages_of_little(told, metrics):
    text = told(metrics=metrics, events=[], arguments=None)
    assert "Settings Not recorded: there is no arguments.json." in text
    assert "Environment Not recorded: there is no environment.json." in text
    assert ("Nothing was logged yet." in text) == (not metrics)


def test_an_evaluation_without_a_number_has_no_best(told):
    text = told(metrics=[{"step": 1, "eval/loss": float("nan")}])
    assert "loss nan nan none" in text


def test_the_method_of_a_run_without_events(told):
    found = [
        told(metrics=[{"step": 1, name: 1.0}], events=[], arguments=flags).split(" of ")[0]
        for name, flags in [
            ("train/value_loss", {"pretrain": "m"}),
            ("train/acc", {"dataset": ["a"]}),
            ("train/loss", {"loss_type": ["dpo"], "dataset": ["a"]}),
            ("train/loss", {"dataset": ["a"]}),
            ("train/loss", {"pretrain": "m"}),
        ]
    ]
    assert found == ["PPO", "Reward model", "DPO", "SFT", "Training run"]


def test_the_page_of_a_run_on_prompts(told):
    metrics = [
        {"step": 1, "train/policy_loss": 0.1, "train/reward": 0.5, "train/reward/right": 0.25},
        {"step": 1, "eval/reward": 0.75, "eval/approx_kl": 0.01, "eval/stop_rate": 1.0},
    ]
    arguments = {"pretrain": "a/b", "prompt_dataset": ["p.jsonl"], "ptx_dataset": ["x.jsonl"]}
    text = told(metrics=metrics, events=[], arguments=arguments)
    assert "on p.jsonl , x.jsonl ." in text
    assert "1 episodes" in text
    assert "0.75 highest of them (episode 1)" in text
    assert "KL from the reference, evaluation nats a response" in text
    assert text.index("Rewards and responses") < text.index("Policy KL from")


def test_a_metric_that_nobody_expected_is_drawn(told):
    text = told(metrics=[{"step": 1, "train/my_own": 1.0, "eval/my_own": 2.0}])
    assert "Other metrics my_own 1.0 1.5 2.0 0 1 2 step my own, training my own, evaluation" in text


def test_a_setting_cannot_end_the_page(tmp_path):
    arguments = {"pretrain": "</title><script>alert(1)</script>", "x": "</pre>\x1b[2J"}
    page = run_page(open_run(made_run(tmp_path, METRICS, arguments=arguments)))
    assert page.count("<script>") == 1
    assert "\x1b" not in page


@pytest.mark.parametrize(
    "seconds, text",
    [(0.5, "0.5 s"), (59.7, "60 s"), (600, "10 min"), (3660, "1 h 1 min"), (180_000, "2 d 2 h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
