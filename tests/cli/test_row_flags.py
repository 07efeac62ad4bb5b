"""The flags of the template's arguments, of thoughts and of what is learned."""

import json

import pytest

from coati.cli.prepare import parse_prepare
from coati.cli.settings import DataSettings
from coati.dataset.chat.row_options import RowOptions
from coati.recipes.run import _check_prepared_options
from coati.utils.logging import forget_warnings
from tests.cli.flat import parse_dpo, parse_sft

PREPARE = ["--type", "sft", "--data_input_dirs", "x", "--tokenizer_dir", "y"]


def test_what_is_given_is_read_and_checked():
    args = parse_prepare(
        [*PREPARE, "--template_args", '{"b": 1, "a": false}', "--thoughts", "keep"]
    )
    assert json.loads(args.template_args) == {"a": False, "b": 1} and args.thoughts == "keep"
    assert (args.empty_thoughts, args.learn) == ("mask", "all_turns")
    args = parse_prepare([*PREPARE, "--learn", "roles:user,assistant"])
    assert RowOptions(learn=args.learn).roles == {"user", "assistant"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--template_args", "{"], "--template_args: is no JSON"),
        (["--template_args", "[1]"], "expected a JSON object {...}, found '[1]'"),
        (["--thoughts", "some"], "--thoughts"),
        (["--learn", "roles:robot"], "and some of system, user, assistant, tool"),
        (["--type", "kto", "--learn", "last_turn"], "--learn last_turn is for --type sft"),
        (["--type", "scored", "--learn", "last_turn"], "every turn of the assistant is learned"),
    ],
)
def test_what_means_nothing_is_refused(words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_prepare([*PREPARE, *words])
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_training_takes_them_too(data, refused):
    needed = ["--pretrain", "some/model", "--dataset", data["dataset"]]
    words = [*needed, "--template_args", '{"enable_thinking": false}', "--thoughts", "last"]
    found = parse_sft([*words, "--learn", "last_turn", "--empty_thoughts", "supervise"])
    assert found.thoughts == "last" and found.learn == "last_turn"
    assert found.template_args == '{"enable_thinking": false}'
    assert "--learn" in refused(parse_dpo, [*needed, "--learn", "last_turn"])


def settings(**given) -> DataSettings:
    return DataSettings(
        dataset=["rows"], eval_dataset=[], dataset_weights=[], max_length=9, **given
    )


def test_prepared_rows_keep_their_arguments(capsys):
    forget_warnings()
    prepared = [{"conversation_template": {"template_args": {"enable_thinking": False}}}]
    _check_prepared_options(settings(), prepared)
    _check_prepared_options(settings(template_args='{"enable_thinking": false}'), prepared)
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match='--dataset was prepared with {"enable_thinking": false}'):
        _check_prepared_options(settings(template_args="{}"), prepared)
    _check_prepared_options(settings(thoughts="keep"), prepared)
    said = capsys.readouterr().err
    assert "--thoughts keep: nothing changes for rows that are prepared" in said
    assert settings(thoughts="keep").row_options == RowOptions(thoughts="keep")
