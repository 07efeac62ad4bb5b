"""The flags of --streaming: what it needs, and what needs all rows before the first step."""

import pytest

from coati.cli.arguments import parse_sft
from coati.cli.preferences import parse_dpo, parse_kto


@pytest.fixture
def words(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    model = tmp_path / "model"
    model.mkdir()
    return ["--pretrain", str(model), "--dataset", str(rows)]


STREAM = ["--streaming", "--max_steps", "9"]


def test_the_settings_of_a_stream(words):
    found = parse_sft([*words, *STREAM, "--shuffle_buffer", "0", "--stream_workers", "3"]).data
    assert found.stream.streaming and found.stream.shuffle_buffer == 0
    assert found.stream.stream_workers == 3 and found.max_bad_ratio == 0.01
    assert not parse_sft(words).data.stream.streaming


def test_what_an_earlier_run_was_told_can_be_told_again(words):
    flags = parse_sft([*words, *STREAM]).flags
    again = [*words, *STREAM, "--max_epochs", str(flags["max_epochs"])]
    assert parse_sft(again).flags == flags


@pytest.mark.parametrize(
    "more, said",
    [
        (["--streaming"], "--streaming needs --max_steps"),
        ([*STREAM, "--max_epochs", "2"], "--max_epochs 2 does nothing with --streaming"),
        ([*STREAM, "--max_samples", "5"], "--max_samples 5 needs all rows before the first step"),
        ([*STREAM, "--eval_ratio", "0.1"], "name evaluation rows with --eval_dataset"),
        (["--shuffle_buffer", "5"], "--shuffle_buffer does nothing without --streaming"),
        (["--stream_workers", "0"], "--stream_workers does nothing without --streaming"),
        ([*STREAM, "--shuffle_buffer", "-1"], "--shuffle_buffer"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(words, capsys, more, said):
    with pytest.raises(SystemExit):
        parse_sft([*words, *more])
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "parse, flag", [(parse_dpo, "--precompute_ref"), (parse_kto, "--auto_weight")]
)
def test_flags_of_preferences_that_need_all_rows(words, capsys, parse, flag):
    assert parse([*words, *STREAM]).data.stream.streaming
    with pytest.raises(SystemExit):
        parse([*words, *STREAM, flag])
    assert f"{flag} needs all rows before the first step" in capsys.readouterr().err
