import json

import pytest

from coati.cli.parser import Parser
from coati.cli.values import add_count, add_number, add_switch, add_text


def parser():
    made = Parser(prog="train")
    add_count(made, "--batch_size", default=4, help="rows")
    add_count(made, "--max_length", "--max_len", default=512, help="tokens")
    add_number(made, "--lr", default=1e-4, unit="RATE", exclusive=True, help="rate")
    add_text(made, "--save_dir", help="where")
    add_count(made, "--save_interval", default=10, least=0, help="steps")
    add_switch(made, "--use_wandb", help="log")
    made.add_argument("--dataset", nargs="+", default=[])
    made.add_argument("--plugin", choices=("ddp", "zero2"))
    return made


def parse(*words):
    return parser().parse_args(list(words))


@pytest.mark.parametrize(
    "word, near", [("--bach_size", "--batch_size"), ("--max-lenght", "--max_length")]
)
def test_an_unknown_flag_is_refused_with_the_nearest_one(refused, word, near):
    assert f"unknown flag {word}; did you mean {near}" in refused(parser().parse_args, [word, "3"])


def test_an_unknown_flag_near_to_none_points_to_the_help(refused):
    assert "unknown flag --qqqq; --help lists the flags" in refused(
        parser().parse_args, ["--qqqq=3"]
    )


def test_all_unknown_flags_are_named_at_once(refused):
    said = refused(parser().parse_args, ["--bach_size", "3", "--lr", "1", "--qqqq", "--max-lenght"])
    assert "unknown flag --bach_size; did you mean --batch_size?; unknown flag --qqqq; " in said
    assert said.rstrip().endswith("unknown flag --max-lenght; did you mean --max_length?")


def test_a_prefix_of_two_flags_is_refused_with_both(refused):
    assert "--save may mean --save_dir or --save_interval" in refused(
        parser().parse_args, ["--save", "x"]
    )


def test_a_prefix_of_one_flag_and_its_alias_is_read_and_said(capsys):
    assert parse("--max_l=7").max_length == 7
    assert "--max_l is read as --max_length" in capsys.readouterr().err


def test_both_spellings_set_the_same_value():
    assert parse("--max_len", "7").max_length == parse("--max_length", "7").max_length == 7


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ["--batch_size", "0"],
            "argument --batch_size: expected a whole number of at least 1, found '0'",
        ),
        (["--batch_size", "2.5"], "found '2.5'"),
        (["--batch_size"], "argument --batch_size: expected one argument"),
        (["--lr", "0"], "argument --lr: expected a number above 0, found '0'"),
        (["--lr", "nan"], "found 'nan'"),
        (["--lr", "-1e-5"], "found '-1e-5'"),
        (["--plugin", "zero9"], "invalid choice: 'zero9'"),
        (["--use_wandb", "maybe"], "is a switch"),
        (["out", "--lr", "1"], "out: a value without a flag before it"),
    ],
)
def test_a_bad_value_names_its_flag(refused, words, said):
    text = refused(parser().parse_args, words)
    assert said in text
    assert text.startswith("train: error: ") and text.count("\n") == 1


def test_switches_take_an_optional_value():
    assert not parse().use_wandb
    assert parse("--use_wandb").use_wandb and parse("--use_wandb", "True").use_wandb
    assert not parse("--use_wandb", "--use_wandb", "false").use_wandb


def test_only_one_process_of_a_machine_speaks(refused, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert refused(parser().parse_args, ["--nothing"]) == ""


def test_a_file_stands_for_flags_and_the_command_line_overrides_it(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "lr: 5e-6\nmax_len: 99\nuse_wandb: yes\ndataset: [a, b c]\nsave_dir: null\nbatch_size: 8 # "
        "rows\n"
    )
    args = parse("--batch_size", "2", "--config", str(file), "--use_wandb", "false")
    assert (args.lr, args.max_length, args.dataset, args.save_dir) == (5e-6, 99, ["a", "b c"], None)
    assert args.batch_size == 2 and args.use_wandb is False


def test_the_resolved_flags_written_as_json_give_the_same_flags_again(tmp_path):
    args = parse("--lr", "0.25", "--dataset", "a", "b", "--use_wandb", "--plugin", "ddp")
    file = tmp_path / "arguments.json"
    flags = {name: value for name, value in vars(args).items() if not name.startswith("_")}
    file.write_text(json.dumps(flags, indent=1))
    again = parse(f"--config={file}")
    # The words that were read are others, what they mean is the same.
    same = {"config": None, "_written": args._written}
    assert vars(again) | same == vars(args)


def test_the_flags_that_were_given_are_those_that_differ_from_their_defaults(tmp_path):
    (tmp_path / "run.yaml").write_text("lr: 0.25\nbatch_size: 4\n")
    args = parse(f"--config={tmp_path}/run.yaml", "--use_wandb", "--dataset", "a")
    assert args._given == ["dataset", "lr", "use_wandb"]


@pytest.mark.parametrize(
    "text, said",
    [
        (
            "lr: 1\nbach_size: 3\n",
            "run.yaml:2: unknown key 'bach_size'; did you mean batch_size",
        ),
        (
            "\nbatch_size: 0\n",
            "run.yaml:2: batch_size: expected a whole number of at least 1, found '0'",
        ),
        ("plugin: zero9\n", "run.yaml:1: plugin: invalid choice: 'zero9'"),
        ("max_len: 3\nmax_length: 4\n", "run.yaml:2: 'max_length' repeats line 1"),
        ("lr: {a: 1}\n", "run.yaml:1: 'lr' holds a mapping"),
        ("batch_size: [1, 2]\n", "run.yaml:1: 'batch_size' takes one value, found 2"),
        ("- lr\n", "run.yaml:1: expected lines of the form 'flag: value'"),
        ("lr: [1\n", "run.yaml:2: not valid YAML"),
        ("help: true\n", "run.yaml:1: unknown key 'help'"),
    ],
)
def test_a_bad_file_names_its_line(refused, tmp_path, text, said):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert said in refused(parser().parse_args, ["--config", str(file)])


def test_a_missing_file_is_named(refused, tmp_path):
    assert "No such file" in refused(parser().parse_args, ["--config", str(tmp_path / "no.yaml")])


def test_help_shows_units_and_defaults():
    text = parser().format_help()
    assert (
        "--max_length, --max_len N" in text
        and "(default: 512)" in text
        and "(default: None)" not in text
    )
