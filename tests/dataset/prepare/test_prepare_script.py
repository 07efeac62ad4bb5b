"""prepare_dataset.py and the shell scripts around it as a user calls them."""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from coati.cli.prepare import parse_prepare
from coati.dataset import load_tokenized_dataset
from coati.dataset.data_types import DATA_TYPES
from tests.cli.documented import documented_commands
from tests.dataset.makers import byte_level, chatml_tokenizer

ROOT = Path(__file__).parents[3]
SCRIPTS = ROOT / "examples" / "data_preparation_scripts"
ALPACA = ROOT / "examples" / "data" / "sft_alpaca.json"


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    chatml_tokenizer().save_pretrained(path)
    return path


def call(monkeypatch, folder: Path, tokenizer: Path, *flags: str, data: Path = ALPACA) -> None:
    argv = [
        "prepare_dataset.py",
        "--type",
        "sft",
        "--data_input_dirs",
        str(data),
        "--tokenizer_dir",
        str(tokenizer),
        "--data_cache_dir",
        str(folder / "cache"),
        "--data_jsonl_output_dir",
        str(folder / "jsonl"),
        "--data_arrow_output_dir",
        str(folder / "arrow"),
        "--num_proc",
        "1",
        *flags,
    ]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(str(SCRIPTS / "prepare_dataset.py"), run_name="__main__")


def failure(monkeypatch, *arguments, **keywords) -> str:
    said = io.StringIO()
    with pytest.raises(SystemExit) as exit, contextlib.redirect_stderr(said):
        call(monkeypatch, *arguments, **keywords)
    assert exit.value.code not in (0, None)
    return said.getvalue()


def test_the_shell_script_prepares_what_the_variables_name(tmp_path, tokenizer_dir):
    template = tmp_path / "template.json"
    environment = os.environ | {
        "SAVE_DIR": str(tmp_path / "out"),
        "DATA_INPUT_DIRS": f"{ALPACA},{ALPACA.with_name('sft_eval.jsonl')}",
        "TOKENIZER_DIR": str(tokenizer_dir),
        "CONVERSATION_TEMPLATE_CONFIG": str(template),
        "MAX_LENGTH": "300",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
    }
    command = ["bash", str(SCRIPTS / "prepare_sft_dataset.sh"), "--num_spliced_dataset_bins", "3"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "jsonl" / "report.json").read_text())
    assert (
        report["rows_read"] == 84 and len(report["shards"]) == 3 and report["length"]["max"] <= 300
    )
    assert done.stdout.endswith(f"--dataset {tmp_path}/out/arrow\n")
    assert "rows read 84" in done.stdout and "[[" in done.stdout and "too_long" in done.stdout
    assert len(load_tokenized_dataset(str(tmp_path / "out" / "arrow"))) == report["rows_written"]
    assert json.loads(template.read_text())["end_of_assistant"] == "<|im_end|>"
    assert "Traceback" not in done.stderr and "just got forked" not in done.stderr


SHELL = {"sft": 4096, "preference": 1024, "prompt": 300, "kto": 1024, "text": 4096}


@pytest.mark.parametrize("type", SHELL)
def test_each_type_has_its_shell_script(type, tmp_path):
    """It hands on the type, the reference's length and further flags; a stand-in for Python shows
    what it calls."""
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    environment = {
        "PATH": os.environ["PATH"],
        "SAVE_DIR": "o u t",
        "DATA_INPUT_DIRS": "a,b",
        "TOKENIZER_DIR": "t",
        "PYTHON": str(tmp_path / "python"),
    }
    command = ["bash", str(SCRIPTS / f"prepare_{type}_dataset.sh"), "--format", "x y"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    script, *words = done.stdout.splitlines()
    given = dict(zip(words[::2], words[1::2], strict=True))
    assert script == str(SCRIPTS / "prepare_dataset.py") and done.stderr == ""
    assert (
        given["--type"] == type
        and given["--max_length"] == str(SHELL[type])
        and given["--format"] == "x y"
    )
    assert (
        given["--data_arrow_output_dir"] == "o u t/arrow"
        and "--conversation_template_config" not in given
    )


@pytest.mark.parametrize("missing", ["SAVE_DIR", "DATA_INPUT_DIRS", "TOKENIZER_DIR"])
@pytest.mark.parametrize("type", SHELL)
def test_the_shell_scripts_refuse_an_empty_variable(type, missing, tmp_path):
    names = {"SAVE_DIR": str(tmp_path / "x"), "DATA_INPUT_DIRS": "x", "TOKENIZER_DIR": "x"}
    environment = os.environ | names | {missing: ""}
    command = ["bash", str(SCRIPTS / f"prepare_{type}_dataset.sh")]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.returncode == 2 and list(tmp_path.iterdir()) == []
    assert done.stderr.startswith(f"prepare_{type}_dataset.sh: {missing} is empty; set it")
    assert done.stderr.count("\n") == 1


def test_no_script_deletes_anything():
    scripts = sorted(SCRIPTS.glob("*.sh"))
    assert len(scripts) == 6 and not any("rm " in script.read_text() for script in scripts)


@pytest.mark.parametrize("stage", ["prepare_sft", "prepare_preference", "prepare_prompt"])
def test_documented_commands_ask_in_one_line_for_what_they_need(stage):
    (command,) = documented_commands(stage)
    nothing = {
        name: text
        for name, text in os.environ.items()
        if name not in ("SAVE_DIR", "DATA_INPUT_DIRS")
    }
    done = subprocess.run(
        command.words({}), env=nothing, capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and "SAVE_DIR is empty; set it" in done.stderr
    )


@pytest.mark.parametrize("type", ["preference", "prompt", "kto"])
def test_the_other_types_as_a_user_prepares_them(
    type, monkeypatch, tmp_path, tokenizer_dir, capsys
):
    sample = ALPACA.with_name(f"{type}.jsonl")
    (tmp_path / "rows.jsonl").write_text(
        "".join(sample.open(encoding="utf-8").readlines()[:30]), encoding="utf-8"
    )
    shape = {"prompt": "messages"}.get(type, type)
    flags = (
        "--type",
        type,
        "--max_length",
        "2000",
        "--num_spliced_dataset_bins",
        "2",
        "--format",
        shape,
    )
    call(monkeypatch, tmp_path, tokenizer_dir, *flags, data=tmp_path / "rows.jsonl")
    report = json.loads((tmp_path / "jsonl" / "report.json").read_text())
    assert (report["type"], report["rows_kept"], report["rows_read"]) == (type, 30, 30)
    table = load_tokenized_dataset(str(tmp_path / "arrow"))
    assert len(table) == 30 and table.column_names == list(DATA_TYPES[type].columns)


def test_a_format_of_another_type_is_refused(capsys):
    words = ["--data_input_dirs", "a", "--tokenizer_dir", "t", "--format", "hh_rlhf"]
    assert parse_prepare(["--type", "preference", *words]).format == "hh_rlhf"
    with pytest.raises(SystemExit) as exit:
        parse_prepare(["--type", "sft", *words])
    said = capsys.readouterr().err
    assert (
        exit.value.code == 2
        and "--format hh_rlhf is for --type preference or prompt; --type sft reads" in said
    )


def test_flags_need_neither_torch_nor_transformers():
    code = (
        "import sys; from coati.cli.prepare import parse_prepare; parse_prepare(['--type', 'sft', "
        "'--data_input_dirs', 'a,b', '--tokenizer_dir', 'x']); assert not {'torch', "
        "'transformers', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)


def test_spellings_of_flags():
    args = parse_prepare(
        [
            "--type",
            "sft",
            "--data_input_dirs",
            "a,b",
            "c",
            "--tokenizer_dir",
            "t",
            "--max_len",
            "64",
            "--strict",
        ]
    )
    assert args.data_input_dirs == ["a", "b", "c"] and args.max_length == 64 and args.strict
    defaults = parse_prepare(["--type", "sft", "--data_input_dirs", "a", "--tokenizer_dir", "t"])
    assert (
        defaults.max_length,
        defaults.num_spliced_dataset_bins,
        defaults.num_samples_per_datafile,
    ) == (4096, 10, -1)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--num_spliced_datset_bins", "3"], "--num_spliced_dataset_bins"),
        (["--max_length", "many"], "--max_length"),
        (["--max_length", "1"], "--max_length"),
        (["--num_samples_per_datafile", "0"], "--num_samples_per_datafile"),
        (["--type", "poem"], "--type"),
        (["--template_mode", "loose"], "--template_mode"),
        (["--max_bad_ratio", "2"], "--max_bad_ratio"),
        (["--eval_ratio", "1"], "--eval_ratio"),
        (["--eval_ratio", "0.1", "--eval_input_dirs", "b"], "give one"),
        (["--drop_eval_overlap"], "--drop_eval_overlap needs evaluation rows"),
        (["--near_duplicates", "0"], "--near_duplicates"),
        (["--min_answer_chars", "9", "--max_answer_chars", "3"], "--max_answer_chars 3 is below"),
    ],
)
def test_wrong_flags_are_named(flags, said, capsys):
    with pytest.raises(SystemExit) as exit:
        parse_prepare(["--type", "sft", "--data_input_dirs", "a", "--tokenizer_dir", "t", *flags])
    assert exit.value.code == 2 and said in capsys.readouterr().err


def test_missing_input_is_named(capsys):
    with pytest.raises(SystemExit):
        parse_prepare(["--type", "sft", "--tokenizer_dir", "t"])
    assert "--data_input_dirs is required" in capsys.readouterr().err


def test_unusable_input_ends_with_a_message(monkeypatch, tmp_path, tokenizer_dir):
    (tmp_path / "empty").mkdir()
    assert "holds no data file" in failure(
        monkeypatch, tmp_path, tokenizer_dir, data=tmp_path / "empty"
    )
    (tmp_path / "bad.jsonl").write_text('{"messages": [\n')
    assert f"{tmp_path}/bad.jsonl:1" in failure(
        monkeypatch, tmp_path, tokenizer_dir, data=tmp_path / "bad.jsonl"
    )
    assert "nothing left" in failure(monkeypatch, tmp_path, tokenizer_dir, "--max_length", "3")
    byte_level(names={"eos_token": "</s>"}).save_pretrained(tmp_path / "bare")
    assert "set chat_template" in failure(monkeypatch, tmp_path, tmp_path / "bare")
    (tmp_path / "t.json").write_text('{"chat_template": "{% for m in messages %}{{ m }}"}')
    said = failure(
        monkeypatch,
        tmp_path,
        tokenizer_dir,
        "--conversation_template_config",
        str(tmp_path / "t.json"),
    )
    assert "Jinja syntax error in line 1" in said
    assert not (tmp_path / "arrow").exists() and not (tmp_path / "jsonl").exists()


def test_a_second_run_is_recognized_and_other_folders_are_refused(
    monkeypatch, tmp_path, tokenizer_dir, capsys
):
    call(monkeypatch, tmp_path, tokenizer_dir)
    first = capsys.readouterr()
    assert "rows read 12, kept 12" in first.out
    call(monkeypatch, tmp_path, tokenizer_dir)
    again = capsys.readouterr()
    assert again.out == first.out and "prepared already" in again.err
    assert "max_length was 4096, now 300" in failure(
        monkeypatch, tmp_path, tokenizer_dir, "--max_length", "300"
    )
    (tmp_path / "other" / "arrow").mkdir(parents=True)
    # Before the tokenizer is loaded.
    assert "exists already" in failure(
        monkeypatch, tmp_path / "other", tmp_path / "no tokenizer here"
    )


def test_an_evaluation_split_and_cleaning_by_flags(monkeypatch, tmp_path, tokenizer_dir, capsys):
    flags = [
        "--eval_ratio",
        "0.25",
        "--deduplicate",
        "--min_answer_chars",
        "1",
        "--num_spliced_dataset_bins",
        "2",
    ]
    call(monkeypatch, tmp_path, tokenizer_dir, *flags)
    said = capsys.readouterr().out
    assert "rows read 9, kept 9" in said and "evaluation split: rows read 3, kept 3" in said
    assert said.endswith(f"--dataset {tmp_path}/arrow --eval_dataset {tmp_path}/arrow/eval\n")
    assert len(load_tokenized_dataset(str(tmp_path / "arrow" / "eval"))) == 3
    stored = json.loads((tmp_path / "arrow" / "eval" / "preparation.json").read_text())
    assert stored["rows"] == 3 and (tmp_path / "jsonl" / "eval" / "part-00001.jsonl").is_file()


def test_check_template_shows_the_mask_and_writes_nothing(
    monkeypatch, tmp_path, tokenizer_dir, capsys
):
    call(monkeypatch, tmp_path, tokenizer_dir, "--check_template")
    shown = capsys.readouterr().out
    assert (
        shown.count("[[Probe answer number") == 2
        and "end_of_assistant '<|im_end|>', stop_ids [[2]]" in shown
    )
    assert list(tmp_path.iterdir()) == []


def test_documents_with_a_token_of_their_own(monkeypatch, tmp_path, tokenizer_dir):
    """As training with the same --add_tokens has it; no template is asked for."""
    text = tmp_path / "a.txt"
    text.write_text("one<new>two\n\nthree\n")
    own = ("--type", "text", "--documents", "paragraph", "--add_tokens", "<new>")
    call(monkeypatch, tmp_path / "out", tokenizer_dir, *own, data=text)
    rows = load_tokenized_dataset(str(tmp_path / "out" / "arrow"))
    assert [row["inputs_decode"] for row in rows] == ["one<new>two<|im_end|>", "three<|im_end|>"]
    made_with = json.loads((tmp_path / "out" / "arrow" / "preparation.json").read_text())
    assert rows[0]["input_ids"][3] == made_with["tokenizer"]["vocab_size"] - 1
    assert made_with["conversation_template"] == {}
    assert made_with["report"]["documents"] == "paragraph"


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--documents", "line"), "--documents says what of a .txt file is a document; rows of"),
        (
            ("--type", "text", "--conversation_template_config", "llama2"),
            "--conversation_template_config does nothing with --type text",
        ),
        (("--type", "text", "--format", "messages"), "--type text reads source_target, text, doc"),
        (("--add_tokens", "absent.txt"), "--add_tokens absent.txt: No such file"),
    ],
)
def test_what_does_not_go_together_with_texts(monkeypatch, tmp_path, tokenizer_dir, flags, said):
    assert said in failure(monkeypatch, tmp_path, tokenizer_dir, *flags)


def test_columns_of_any_names(tmp_path, tokenizer_dir, monkeypatch):
    rows = [{"ask": f"q{n}", "reply": {"text": f"a{n}"}, "images": "x.png"} for n in range(60)]
    data = tmp_path / "rows.ndjson"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ("--columns", "prompt=ask,response=reply.text")
    said = failure(monkeypatch, tmp_path, tokenizer_dir, *names, "--strict_columns", data=data)
    assert f"images (the first: {data}:1)" in said and not (tmp_path / "arrow").exists()
    call(monkeypatch, tmp_path, tokenizer_dir, *names, "images=", "--strict_columns", data=data)
    made = load_tokenized_dataset(str(tmp_path / "arrow")).data.table.to_pylist()
    assert sorted(row["labels_decode"][0] for row in made)[0] == "a0<|im_end|>" and len(made) == 60


def test_columns_that_cannot_be_named(tmp_path, tokenizer_dir, monkeypatch):
    said = failure(monkeypatch, tmp_path, tokenizer_dir, "--columns", "question=ask")
    assert "--columns: 'question' is nothing that a column can be; expected one of messages" in said


def test_a_single_document_cannot_be_held_out(monkeypatch, tmp_path, tokenizer_dir):
    text = tmp_path / "a.txt"
    text.write_text("one\ntwo\n")
    own = ("--type", "text", "--eval_ratio", "0.1")
    said = failure(monkeypatch, tmp_path / "out", tokenizer_dir, *own, data=text)
    assert "so few rows that all were drawn for evaluation" in said and "--eval_input_dirs" in said
