"""The flags of coati gkd: defaults, names of other libraries, and what is refused before torch."""

import pytest

from coati.cli.distilling import NEW_TOKENS, TOP_K
from tests.cli.flat import parse_gkd

GIVEN = ["--pretrain", "M", "--dataset", ".", "--save_dir", "S"]
HERE = [*GIVEN, "--teacher", "T"]
THERE = [*GIVEN, "--teacher_url", "http://host:8000/v1"]


def test_defaults():
    args = parse_gkd(HERE)
    assert (args.gkd_beta, args.gkd_lambda, args.temperature, args.sft_coef) == (0.5, 0.5, 0.9, 0)
    assert (args.max_new_tokens, args.inference_batch_size) == (NEW_TOKENS, None)
    assert args.teacher_top_k is None and parse_gkd(THERE).teacher_top_k == TOP_K
    assert parse_gkd([*HERE, "--max_length", "64"]).max_new_tokens == 63
    assert parse_gkd([*HERE, "--gkd_lambda", "0"]).max_new_tokens == NEW_TOKENS


def test_names_of_other_libraries():
    """TRL's GKDConfig, and ms-swift's."""
    words = ["--lmbda", "0.2", "--beta", "0.1", "--max_completion_length", "77"]
    words += ["--sft_alpha", "0.3", "--teacher_model_name_or_path", "T"]
    args = parse_gkd([*GIVEN, *words])
    assert (args.gkd_lambda, args.gkd_beta, args.max_new_tokens) == (0.2, 0.1, 77)
    assert (args.sft_coef, args.teacher) == (0.3, "T")
    assert parse_gkd([*GIVEN, "--teacher_model", "T"]).teacher == "T"
    args = parse_gkd([*GIVEN, "--teacher_model_server_url", "http://h:1"])
    assert args.teacher_url == "http://h:1"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (GIVEN, "--teacher is missing: the model to distill from"),
        ([*THERE, "--teacher", "T"], "--teacher and --teacher_url both name a teacher"),
        ([*HERE, "--teacher_top_k", "5"], "--teacher_top_k belongs to --teacher_url"),
        ([*HERE, "--teacher_served_name", "x"], "--teacher_served_name belongs to --teacher_url"),
        ([*GIVEN, "--teacher_url", "host:8000"], "expected a URL like http://host:8000/v1"),
        ([*THERE, "--packing", "--gkd_lambda", "0"], "--packing: a server reads one row at a time"),
        ([*THERE, "--tp", "2"], "--tp 2: the processes that split the student would each ask"),
        ([*HERE, "--gkd_beta", "1.1"], "--gkd_beta: expected a number"),
        ([*HERE, "--gkd_lambda", "2"], "--gkd_lambda: expected a number"),
        ([*HERE, "--temperature", "-1"], "--temperature: expected a number"),
        ([*HERE, "--pp", "2", "--plugin", "3d", "--batch_size", "8"], "--pp 2: the teacher's stat"),
        (
            [*HERE, "--plugin", "3d", "--tp", "2", "--enable_sequence_parallelism"],
            "student and teacher are compared on whole rows",
        ),
        ([*HERE, "--packing"], "--packing: a response of the student would change how rows share"),
        ([*HERE, "--disable_loss_mask"], "--disable_loss_mask: it hides where the prompt of a row"),
        (
            [*HERE, "--max_length", "64", "--max_new_tokens", "64"],
            "--max_new_tokens 64 leaves no room for a prompt in --max_length 64",
        ),
        (
            [*HERE, "--gkd_lambda", "0", "--max_new_tokens", "9"],
            "--max_new_tokens does nothing with --gkd_lambda 0",
        ),
        (
            [*HERE, "--gkd_lambda", "0", "--inference_batch_size", "9"],
            "--inference_batch_size does nothing with --gkd_lambda 0",
        ),
    ],
)
def test_refused_with_one_line(words, said, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as end:
        parse_gkd(words)
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error: " in x]
    assert end.value.code == 2 and said in line


def test_what_packs_and_whole_rows_need_is_that_no_row_is_answered():
    for flag in ("packing", "disable_loss_mask"):
        assert getattr(parse_gkd([*HERE, f"--{flag}", "--gkd_lambda", "0"]), flag)
