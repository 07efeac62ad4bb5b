"""Questions from files, dialogues to a file, the system message: what inference.py does beside
talking."""

import io
import json
import sys

import pytest

from coati.inference.model_loading import load, with_system
from coati.inference.transcript import Transcript, conversations, read_tools
from tests.inference.test_model_loading import write
from tests.inference.test_script import model, run, script  # noqa: F401


def round_of(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def rows(file):
    return [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_dialogue_is_one_row_with_the_rounds_that_were_forgotten_too(tmp_path):
    record = Transcript(tmp_path / "t.jsonl")
    record.add(round_of("a", "1"))
    again = round_of("b", "2")  # the first round did not fit any more
    record.add(again)
    record.add(again)  # a question that got no answer
    record.add(round_of("b", "2"))
    record.close()
    record.add([])
    record.add([{"role": "user", "content": "no answer"}])
    record.close()
    record.add(round_of("c", "é"))
    record.close()
    assert rows(tmp_path / "t.jsonl") == [
        round_of("a", "1") + 2 * round_of("b", "2"),
        round_of("c", "é"),
    ]


def test_without_a_file_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = Transcript(None)
    record.add(round_of("a", "1"))
    record.close()
    assert list(tmp_path.iterdir()) == []


def test_the_script_appends_its_dialogues(run, tmp_path):  # noqa: F811
    file = tmp_path / "t.jsonl"
    run("--io", "dummy", "--transcript", str(file), typed="hello\nhow are you?\nclear\nhello\n")
    first, second = rows(file)
    assert [message["content"] for message in first[::2]] == ["hello", "how are you?"] and len(
        first
    ) == 4
    assert second == first[:2]
    run("--io", "dummy", "--transcript", str(file), "--prompt", "hello")
    assert rows(file) == [first, second, second]


def test_each_line_of_a_file_or_a_pipe_is_a_dialogue_of_its_own(run, tmp_path):  # noqa: F811
    file = tmp_path / "q.txt"
    file.write_text("hello\n\nhello\n")
    answers = run("--io", "dummy", "--prompt_file", str(file))
    assert answers == 2 * run("--io", "dummy", "--prompt", "hello")
    assert answers == run("--io", "dummy", "--prompt_file", "-", typed="hello\nhello\n")


def test_rows_bring_what_was_said_before(tmp_path):
    file = tmp_path / "q.jsonl"
    messages = [*round_of("a", "1"), {"role": "user", "content": "b"}]
    file.write_text(json.dumps({"messages": messages}) + "\n")
    assert conversations(str(file)) == [(round_of("a", "1"), "b", None)]


def test_rows_bring_tools_and_a_file_holds_some(tmp_path):
    schema = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    file = tmp_path / "q.jsonl"
    row = {"messages": [{"role": "user", "content": "b"}], "tools": [schema]}
    file.write_text(json.dumps(row) + "\n")
    assert conversations(str(file)) == [([], "b", [schema])]
    tools = tmp_path / "tools.json"
    for held in ([schema], [schema["function"]]):
        tools.write_text(json.dumps(held))
        assert read_tools(str(tools)) == [schema]
    for held in ("{", "[]", "{}", "[1]", '[{"name": "f"}, 1]', '[{"type": "function"}]'):
        tools.write_text(held)
        with pytest.raises(ValueError, match=r"--tools .*expected a JSON list of schemas"):
            read_tools(str(tools))


def test_files_without_questions_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n \n"))
    with pytest.raises(ValueError, match="--prompt_file -: holds no question"):
        conversations("-")
    with pytest.raises(ValueError, match="--prompt_file .*gone.txt"):
        conversations(str(tmp_path / "gone.txt"))
    (tmp_path / "q.jsonl").write_text('{"nothing": 1}\n')
    with pytest.raises(ValueError, match="no question here"):
        conversations(str(tmp_path / "q.jsonl"))


def test_the_system_message_can_be_replaced_and_left_away(tmp_path):
    write(tmp_path, system="Be brief.")
    loaded = load(tmp_path, device="cpu")
    asked = [{"role": "user", "content": "hi"}]
    changed = with_system(loaded, "Be long.").conversation.render(asked)
    assert changed.startswith("<|im_start|>system\nBe long.<|im_end|>")
    assert "system" not in with_system(loaded, "").conversation.render(asked)
    assert "Be brief." in loaded.conversation.render(asked)
