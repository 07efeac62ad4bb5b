"""Reading a run's directory: whole, half-written, of an earlier release, or no run at all."""

import json

import pytest

from coati.trainer.run_report.run_files import RunFiles, open_run
from tests.trainer.run_report.made_runs import made_run


def values(run, name):
    series = run.metrics[name]
    return list(zip(series.steps, series.values, strict=True))


def test_metrics_by_name(tmp_path):
    run = open_run(made_run(tmp_path))
    assert values(run, "train/loss") == [(10, 2.5), (20, 1.75), (30, 1.25)]
    assert values(run, "eval/loss") == [(0, 3.25), (20, 1.5), (40, 1.625)]
    assert run.last_step == 40
    assert run.remarks() == []


def test_reading_on_takes_in_only_what_is_new(tmp_path):
    made_run(tmp_path, [{"step": 1, "train/loss": 2.0}])
    run = open_run(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "train/loss": 1.0}\n{"step": 3, "train/')
        file.flush()
        run.read_on()
        assert values(run, "train/loss") == [(1, 2.0), (2, 1.0)]
        assert len(run.remarks()) == 1
        file.write('loss": 0.5}\n')
    run.read_on()
    assert values(run, "train/loss") == [(1, 2.0), (2, 1.0), (3, 0.5)]
    assert run.remarks() == []


def test_a_line_that_is_cut_off_is_said_and_the_others_are_read(tmp_path):
    made_run(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 41, "train/lo')
    run = open_run(tmp_path)
    assert run.last_step == 40
    [remark] = run.remarks()
    assert remark.startswith("metrics.jsonl: the last line is cut off")


def test_broken_lines_are_counted_and_named(tmp_path):
    made_run(tmp_path, [{"step": 1, "train/loss": 2.0}])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('\0\0\0\n[1]\n\n{"step": 2, "train/loss": 1.0}\n')
    run = open_run(tmp_path)
    assert values(run, "train/loss") == [(1, 2.0), (2, 1.0)]
    [remark] = run.remarks()
    assert "2 of 5 lines" in remark and "(line 2, 3)" in remark


def test_numbers_that_are_none_are_kept_as_they_are(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": NaN, "note": "text"}\n')
    run = open_run(tmp_path)
    assert run.metrics["train/loss"].finite() == []
    assert len(run.metrics["train/loss"].values) == 1
    assert "note" not in run.metrics


def test_few_of_many_samples_stay_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("coati.trainer.run_report.run_files.MOST_SAMPLES", 4)
    rows = [{"step": step, "prompt": f"p{step}", "response": "r"} for step in range(50)]
    run = open_run(made_run(tmp_path, samples=rows))
    assert [row["step"] for row in run.samples] == [0, 1, 46, 47, 48, 49]


@pytest.mark.parametrize(
    "held, found",
    [([], "an empty directory"), (["config.json", "modeling/"], "config.json, modeling/")],
)
def test_a_directory_without_a_run_says_what_is_there(tmp_path, held, found):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in held:
        (folder / name).mkdir() if name.endswith("/") else (folder / name).touch()
    with pytest.raises(ValueError, match=rf"holds metrics\.jsonl; found {found}"):
        open_run(folder)


def test_a_run_nearby_is_named(tmp_path):
    made_run(tmp_path / "out/sft")
    (tmp_path / "out/sft/modeling").mkdir()
    with pytest.raises(ValueError, match="Runs are in .*out/sft$"):
        open_run(tmp_path / "out/sft/modeling")
    with pytest.raises(ValueError, match="Runs are in .*out/sft$"):
        open_run(tmp_path / "out")
    with pytest.raises(ValueError, match="there is no such directory"):
        open_run(tmp_path / "nowhere")


def test_a_json_file_that_is_none_is_named(tmp_path):
    made_run(tmp_path)
    (tmp_path / "arguments.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"arguments\.json: expected a JSON object"):
        open_run(tmp_path)
    (tmp_path / "arguments.json").write_text('{"lr": ')
    with pytest.raises(ValueError, match=r"arguments\.json:1:8: not valid JSON"):
        open_run(tmp_path)


def test_settings_stand_for_arguments_that_are_not_there(tmp_path):
    run = RunFiles(made_run(tmp_path, arguments=None), {"lr": 0.5})
    run.read_on()
    assert run.arguments == {"lr": 0.5}
    (tmp_path / "arguments.json").write_text(json.dumps({"lr": 0.25}))
    run.read_on()
    assert run.arguments == {"lr": 0.25}
