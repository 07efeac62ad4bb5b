"""Columns of any names: --columns, dotted paths, LLaMA-Factory's dataset_info.json; the advice of
errors, followed."""

import json
import re

import pytest

from coati.dataset.rows.column_names import TARGETS, Layout, parse_columns
from coati.dataset.rows.formats import read_row
from coati.dataset.rows.input_files import find_files, find_sources, source_rows
from coati.dataset.rows.row_errors import RowError
from coati.recipes.prepared import held_out_split, is_raw
from tests.dataset.rows.test_format_files import round_of_calls, talk

CHAT = talk("1 + 2 = ?", "3")


def layout(*words: str) -> Layout:
    return Layout(parse_columns(words))


def read(type: str, row: dict, *words: str):
    return read_row(type, row, layout=layout(*words))


def test_any_columns_by_name():
    row = {"ask": "1 + 2 = ?", "say": "3", "persona": "Be brief.", "id": 7}
    found = read("sft", row, "prompt=ask,response=say", "system=persona")
    assert (found.messages, found.unused) == (
        talk("1 + 2 = ?", "3", system="Be brief."),
        {"id": False},
    )
    pair = {"q": "1 + 2 = ?", "good": "3", "bad": "4"}
    found = read("preference", pair, "prompt=q,chosen=good,rejected=bad")
    assert (found.messages, found.chosen) == (CHAT[:1], CHAT[1:])
    assert found.rejected == [{"role": "assistant", "content": "4"}]
    found = read("kto", {**pair, "mark": "no"}, "prompt=q,response=bad,label=mark")
    assert (found.completion, found.label, set(found.unused)) == ("4", False, {"good"})
    found = read("prompt", {**pair, "truth": 3}, "prompt=q,gt_answer=truth")
    assert (found.messages, found.gt_answer) == (CHAT[:1], "3")
    found = read("sft", {"turns": CHAT, "schemas": [{"name": "f"}]}, "messages=turns,tools=schemas")
    assert found.messages == CHAT and found.tools[0]["function"] == {"name": "f"}
    found = read("sft", {"body": "Rivers run."}, "target=body")
    assert (found.text, found.format) == ("Rivers run.", "source_target")
    found = read(
        "sft",
        {"q": "1 + 2 = ?", "why": "One more than two.", "a": "3"},
        "prompt=q,response=a,reasoning=why",
    )
    assert found.messages[1]["reasoning_content"] == "One more than two."


def test_named_columns_alone_decide():
    """A row that has a format of its own is read by the names that are given."""
    row = {"messages": talk("not", "these"), "question": "1 + 2 = ?", "answer": "3", "system": "s"}
    found = read("sft", row, "prompt=question,response=answer")
    assert found.messages == talk("1 + 2 = ?", "3", system="s")
    assert found.unused == {"messages": False}


@pytest.mark.parametrize(
    "data",
    [
        {"task": {"ask": "1 + 2 = ?", "by": "Ann"}, "tries": [{"say": "4"}, {"say": "3", "ok": 1}]},
        {
            "task": json.dumps({"ask": "1 + 2 = ?", "by": "Ann"}),
            "tries": json.dumps([{"say": "4"}, {"say": "3", "ok": 1}]),
        },
    ],
)
def test_dotted_paths_go_into_objects_lists_and_json(data):
    found = read("sft", data, "prompt=task.ask,response=tries.1.say")
    assert found.messages == CHAT
    assert found.unused == dict.fromkeys(("task.by", "tries.0", "tries.1.ok"), False)
    found = read("sft", {"task.ask": "1 + 2 = ?", "a": "3"}, "prompt=task.ask,response=a")
    assert found.messages == CHAT


def test_a_column_that_is_not_to_be_read():
    row = {"question": "1 + 2 = ?", "context": "Sums.", "answer": "3", "images": ["a.png"]}
    assert read_row("sft", row).unused == {"images": True}
    found = read("sft", row, "context=", "images=")
    assert (found.messages, found.unused) == (CHAT, {})


def test_named_columns_that_are_not_there():
    with pytest.raises(RowError, match="prompt=ask: no column ask; found q, a"):
        read("sft", {"q": "x", "a": "y"}, "prompt=ask,response=a")
    found = read("sft", {"q": "1 + 2 = ?", "a": "3"}, "prompt=q,response=a,system=persona")
    assert found.messages == CHAT  # what only some rows have


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("question", "expected NAME=COLUMN, as in prompt=question"),
        ("ask=question", "'ask' is nothing that a column can be; expected one of messages, prompt"),
        ("prompt=a,prompt=b", "prompt is named twice"),
    ],
)
def test_names_that_cannot_be(word, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        parse_columns([word])
    assert parse_columns(["prompt=a, response=b".replace(" ", ""), "zzz="]) == {
        "prompt": "a",
        "response": "b",
        "zzz": "",
    }


ADVISED = [
    ("sft", {"ask": "1 + 2 = ?", "say": "3"}, {"prompt": "ask", "response": "say"}),
    (
        "kto",
        {"ask": "1 + 2 = ?", "say": "3", "ok": True},
        {"prompt": "ask", "response": "say", "label": "ok"},
    ),
    (
        "preference",
        {"ask": "1 + 2 = ?", "a": "3", "b": "4"},
        {"prompt": "ask", "chosen": "a", "rejected": "b"},
    ),
    ("prompt", {"ask": "1 + 2 = ?"}, {"prompt": "ask"}),
    (
        "preference",
        {"ask": "1 + 2 = ?", "chosen": "3", "rejected": "4"},
        {"prompt": "ask", "chosen": "chosen", "rejected": "rejected"},
    ),
]


@pytest.mark.parametrize(("type", "row", "names"), ADVISED)
def test_the_advice_of_an_error_works(type, row, names):
    with pytest.raises(RowError) as error:
        read_row(type, row)
    [flag] = re.findall(r"--columns (\S+?)(?=[;\s]|$)", str(error.value))
    for word in flag.split(","):
        target, column = word.split("=")
        assert target in TARGETS and column == "NAME"
    given = [word.replace("NAME", names[word.split("=")[0]]) for word in flag.split(",")]
    rest = [f"{name}={column}" for name, column in names.items() if f"{name}=" not in flag]
    found = read(type, row, *given, *rest)
    assert found.messages == CHAT[:1] or found.messages == CHAT


def test_the_advice_for_plain_texts_works():
    with pytest.raises(RowError) as error:
        read_row("text", {"body": "Rivers run to the sea."})
    flag = str(error.value).rpartition("--columns ")[2].replace("NAME", "body")
    for type in ("text", "sft"):
        assert read(type, {"body": "Rivers run to the sea."}, flag).text == "Rivers run to the sea."


def test_the_advice_for_single_messages_and_scored_responses():
    message = {"message_id": "a", "parent_id": None, "text": "Name a river.", "role": "prompter"}
    with pytest.raises(RowError, match=r"each tree in one row \(.trees.jsonl.gz\)"):
        read_row("sft", message)
    tree = {"prompt": {**message, "replies": [{"text": "The Rhine.", "role": "assistant"}]}}
    assert read_row("sft", tree).messages == talk("Name a river.", "The Rhine.")
    row = {"prompt": "q", "response": "a", "helpfulness": 4, "verbosity": 1}
    with pytest.raises(RowError, match="pairs of HelpSteer2 are in its preference/ folder"):
        read_row("preference", row)


INFO = {
    "alpaca_like": {
        "file_name": "a.json",
        "columns": {"prompt": "ask", "query": "more", "response": "say", "system": "persona"},
    },
    "chat": {
        "file_name": "b.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "turns", "tools": "schemas"},
        "tags": {
            "role_tag": "who",
            "content_tag": "said",
            "user_tag": "U",
            "assistant_tag": "A",
            "function_tag": "F",
            "observation_tag": "O",
            "system_tag": "S",
        },
        "num_samples": 1,
    },
    "plain": {"file_name": "c.jsonl"},
}
WHO = [
    {"who": "U", "said": "Weather in Ulm?"},
    {"who": "F", "said": '{"name": "get_weather", "arguments": {"city": "Ulm"}}'},
]
WHO += [{"who": "O", "said": '{"sky": "clear"}'}, {"who": "A", "said": "Clear."}]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps(INFO))
    rows = [{"ask": "1 + 2", "more": "= ?", "say": "3", "persona": "Be brief."}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    schemas = '[{"name": "get_weather", "parameters": {}}]'
    chat = json.dumps({"turns": WHO, "schemas": schemas})
    (tmp_path / "b.jsonl").write_text(f"{chat}\n{chat}\n")
    (tmp_path / "c.jsonl").write_text(json.dumps({"instruction": "1 + 2 = ?", "output": "3"}))
    (tmp_path / "notes.json").write_text("[]")
    return tmp_path


@pytest.mark.parametrize("by", ["folder", "file"])
def test_a_list_of_inputs(folder, by):
    path = folder if by == "folder" else folder / "dataset_info.json"
    assert [file.name for file in find_files([path])] == ["a.json", "b.jsonl", "c.jsonl"]
    found = [row for _, row in source_rows([path], "sft")]
    assert [row.messages for row in found] == [
        talk("1 + 2\n\n= ?", "3", system="Be brief."),
        round_of_calls(),
        CHAT,
    ]
    assert found[1].tools[0]["function"]["name"] == "get_weather"
    assert not any(row.unused for row in found)


def test_one_of_a_list_of_inputs(folder):
    # Its files are no split to evaluate on.
    for path in (folder, folder / "dataset_info.json", f"{folder / 'dataset_info.json'}:plain"):
        assert is_raw(str(path)) and held_out_split(str(path)) is None
    [source] = find_sources([f"{folder / 'dataset_info.json'}:chat"])
    assert source.path.name == "b.jsonl" and source.limit == 1
    with pytest.raises(ValueError, match="has no data set verse; found alpaca_like, chat, plain"):
        find_files([f"{folder}:verse"])


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"file_name": "absent.json"}, "x: there is no .*absent.json"),
        ({"ms_hub_url": "a/b"}, "only file_name and hf_hub_url can be read, found ms_hub_url"),
        ({"file_name": "a.json", "columns": {"ask": "q"}}, "columns has ask; known: prompt"),
        ({"file_name": "a.json", "num_samples": "many"}, "num_samples is 'many'"),
    ],
)
def test_entries_that_cannot_be_read(folder, entry, said):
    (folder / "dataset_info.json").write_text(json.dumps({"x": entry}))
    with pytest.raises(ValueError, match=said):
        find_files([folder])


def test_pictures_of_a_list_of_inputs_are_named(folder):
    entry = {
        "file_name": "a.json",
        "columns": {"prompt": "ask", "response": "say", "images": "shots"},
    }
    (folder / "dataset_info.json").write_text(json.dumps({"x": entry}))
    (folder / "a.json").write_text(json.dumps([{"ask": "q", "say": "a", "shots": ["1.png"]}]))
    [(_, row)] = source_rows([folder], "sft")
    assert row.unused == {"images": True}
