"""inference.py: questions from a pipe or a flag, commands, and errors that name the flag."""

import importlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from coati.cli import inference as flags
from coati.inference.console import CONSOLES
from tests.inference.test_end_tokens import SAID, saved
from tests.inference.test_model_loading import write

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "inference" / "inference.py"


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("coati.recipes.verbs.chat")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    write(directory)
    return str(directory)


@pytest.fixture
def run(script, model, monkeypatch, capsys):
    """Run the script's main in this process: ``run(*flags, typed=...)`` gives what it printed."""

    def run(*argv, typed=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        argv = ["--model_path", model, "--max_new_tokens", "6", "--temperature", "0", *argv]
        script.main(flags.parse_inference(argv))
        return capsys.readouterr().out

    return run


def test_a_pipe_is_answered_line_by_line_until_exit(run):
    out = run("--io", "simple", typed="hello\n\nhow are you?\nclear\nhello\nexit\nnever\n")
    shown = [line for line in out.splitlines() if line.startswith("user: ")]
    assert shown == ["user: hello", "user: how are you?", "user: hello"]
    answers = out.split("assistant: ")
    assert len(answers) == 4
    assert answers[1].split("\nuser: ")[0] == answers[3].removesuffix(
        "\n"
    )  # a new dialogue after `clear`


def test_prompts_are_dialogues_of_their_own(run):
    first, second = run("--io", "simple", "--prompt", "hello", "--prompt", "hello").split(
        "user: hello\n"
    )[1:]
    assert first == second and first.startswith("assistant: ")


def test_the_dummy_console_prints_nothing_but_answers(run):
    simple = run("--io", "simple", "--prompt", "hello").split("assistant: ")[1]
    assert (
        run("--io", "dummy", "--prompt", "hello") == simple == run("--io", "dummy", typed="hello\n")
    )


def test_the_rich_console_shows_the_same_answer(run):
    simple = run("--io", "simple", "--prompt", "hello").split("assistant: ")[1]
    shown = run("--io", "rich", "--prompt", "hello")
    assert "user: hello" in shown and "assistant:" in shown
    assert "".join(simple.split()) in "".join(shown.split())


def test_a_pipe_gets_the_responses_alone_and_a_terminal_colors(run, monkeypatch):
    simple = run("--io", "simple", "--prompt", "hello").split("assistant: ")[1]
    assert run("--prompt", "hello") == simple
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "assistant:" in run("--prompt", "hello")


def test_the_parser_offers_every_console():
    assert set(flags.CONSOLES) == set(CONSOLES)


def test_an_answer_cut_off_is_said(script, model, capsys):
    argv = ["--model_path", model, "--max_new_tokens", "2", "--prompt", "hi", "--seed", "1"]
    script.main(flags.parse_inference(argv))
    assert "cut off at --max_new_tokens 2" in capsys.readouterr().err


def test_an_empty_answer_is_said(script, tmp_path, capsys):
    directory = str(saved(tmp_path / "model", [2, SAID]))  # it ends at once
    argv = ["--model", directory, "--prompt", "hi", "--io", "dummy", "--max_new_tokens", "9"]
    script.main(flags.parse_inference(argv))
    said = capsys.readouterr()
    assert said.out == "\n" and said.err.endswith("(empty response)\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model_path", "/nowhere"], "--model_path /nowhere: no such directory"),
        (["--tokenizer_path", "/nowhere"], "--tokenizer_path /nowhere: no such directory"),
        (
            ["--conversation_template_config", "/no.json"],
            "--conversation_template_config /no.json: no such file",
        ),
    ],
)
def test_what_cannot_be_loaded_is_named_with_its_flag(script, model, argv, message):
    with pytest.raises(ValueError, match=message):
        script.main(flags.parse_inference(["--model_path", model, *argv]))


def test_a_question_that_is_too_long_ends_a_pipe_with_an_error(run):
    with pytest.raises(ValueError, match="--model_max_length"):
        run("--model_max_length", "20", typed="many words " * 20 + "\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--model_path is required"),
        (
            ["--model_path", "m", "--max_new_tokens", "99", "--model_max_length", "99"],
            "--max_new_tokens 99 leaves no",
        ),
        (["--model_path", "m", "--io", "fancy"], "--io"),
        (["--model_path", "m", "--top_p", "1.5"], "--top_p"),
        (["--model_path", "m", "--temprature", "1"], "--temperature"),
    ],
)
def test_bad_flags_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        flags.parse_inference(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_the_command_itself(model):
    command = [
        sys.executable,
        str(SCRIPT),
        "--model_path",
        model,
        "--io",
        "dummy",
        "--max_new_tokens",
        "4",
    ]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2])}
    done = subprocess.run(
        command, input="hello\n", capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0 and len(done.stdout.splitlines()) >= 1
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
