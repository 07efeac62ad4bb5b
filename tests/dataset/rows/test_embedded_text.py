"""Texts that are JSON or Python of messages: decoded where messages may stand, refused elsewhere,
never trained as they stand."""

import json

import pytest

from coati.dataset.rows.embedded_text import decoded, is_messages_text
from coati.dataset.rows.formats import read_row
from coati.dataset.rows.row_errors import RowError
from tests.dataset.rows.test_format_files import talk

TALK = talk("1 + 2 = ?", "3")
SHAREGPT = [{"from": "human", "value": "1 + 2 = ?"}, {"from": "gpt", "value": "3"}]
WAYS = {
    "JSON": json.dumps,
    "indented": lambda found: "\n " + json.dumps(found, indent=2) + "\n",
    "Python": repr,
    "quoted twice": lambda found: json.dumps(json.dumps(found)),
    "a tuple": lambda found: repr(tuple(found)),
    "other keys first": lambda found: json.dumps(
        [{"tool_calls": None, "weight": 1, **m} for m in found]
    ),
}


def plain(messages: list[dict]) -> list[dict]:
    return [{"role": one["role"], "content": one["content"]} for one in messages]


@pytest.mark.parametrize("write", WAYS.values(), ids=WAYS)
def test_columns_of_messages_as_text_are_decoded(write):
    for found in (
        read_row("sft", {"messages": write(TALK)}),
        read_row("sft", {"conversations": write(SHAREGPT)}),
        read_row("sft", {"conversation": write(SHAREGPT)}),
        read_row("sft", {"prompt": write(TALK[:1]), "completion": write(TALK[1:])}),
        read_row("sft", {"input": write(TALK[:1]), "output": "3"}),
    ):
        assert plain(found.messages) == TALK and found.unused == {}
    pair = {"prompt": "1 + 2 = ?", "chosen": write(TALK[1:]), "rejected": write(talk("", "4")[1:])}
    found = read_row("preference", pair)
    assert (found.messages, plain(found.chosen)) == (TALK[:1], TALK[1:])
    assert plain(found.rejected) == talk("", "4")[1:]
    whole = {"chosen": write(TALK), "rejected": write([*TALK[:1], *talk("", "4")[1:]])}
    same = read_row("preference", whole)
    assert (plain(same.messages), plain(same.chosen)) == (TALK[:1], TALK[1:])
    assert same.rejected == found.rejected
    judged = {"prompt": write(TALK[:1]), "completion": write(TALK[1:]), "label": "True"}
    assert read_row("kto", judged).completion == "3"
    assert plain(read_row("prompt", {"prompt": write(TALK[:1])}).messages) == TALK[:1]


@pytest.mark.parametrize("write", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(
    "row",
    [
        lambda text: {"messages": [{"role": "user", "content": text}, TALK[1]]},
        lambda text: {"messages": [TALK[0], {"role": "assistant", "content": text}]},
        lambda text: {"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]},
        lambda text: {"instruction": text, "output": "3"},
        lambda text: {"instruction": "Add.", "input": text, "output": "3"},
        lambda text: {"instruction": "Add.", "output": text},
        lambda text: {"instruction": "Add.", "output": "3", "system": text},
        lambda text: {"instruction": "Add.", "output": "3", "history": [[text, "x"]]},
        lambda text: {"source": "", "target": text},
        lambda text: {"question": "Add.", "context": text, "answer": "3"},
    ],
)
def test_elsewhere_they_are_refused(row, write):
    with pytest.raises(RowError) as error:
        read_row("sft", row(write(TALK)))
    assert error.value.reason == "messages_as_text"


def test_what_cannot_be_decoded_is_refused_too():
    # As pandas writes an array of objects: no commas.
    numpy = "[{'content': '1 + 2 = ?', 'role': 'user'}\n {'content': '3', 'role': 'assistant'}]"
    cut = json.dumps(TALK)[:-12]
    for text in (numpy, cut, f"array({TALK!r}, dtype=object)"):
        for row in ({"messages": text}, {"prompt": text, "completion": "3"}):
            with pytest.raises(RowError) as error:
                read_row("sft", row)
            assert error.value.reason == "messages_as_text"


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2, 3]",
        '{"name": "Ann", "age": 3}',
        "[{'a': 1}]",
        '"quoted"',
        "'tis so",
        '{"role": "admin", "rights": ["read"]}',
        '{"from": "USD", "to": "EUR", "value": 5}',
        "{'from': 'USD', 'to': 'EUR', 'value': 5, }}",
        '[{"role": "admin", "content": "page"}]',
        "[INST] role: user [/INST]",
        '[{"role": "user", "content": "x"}] is what a request holds. What is it called?',
        "({",
    ],
)
def test_other_texts_are_left_alone(text):
    assert not is_messages_text(text)
    row = {"messages": talk(text, text)}
    assert read_row("sft", row).messages == row["messages"]


def test_results_of_tools_may_be_any_json():
    call = {"name": "list_messages", "arguments": {}}
    row = {
        "messages": [
            *TALK[:1],
            {"role": "assistant", "content": "", "function_call": call},
            {"role": "tool", "content": json.dumps(TALK)},
            TALK[1],
        ]
    }
    assert read_row("sft", row).messages[2] == {"role": "tool", "content": json.dumps(TALK)}
    row["messages"][2]["content"] = {"sky": ["clear", None]}
    assert read_row("sft", row).messages[2]["content"] == '{"sky": ["clear", null]}'


def test_a_line_that_was_encoded_twice_is_a_row():
    assert read_row("sft", json.dumps({"messages": TALK})).messages == TALK
    assert read_row("sft", json.dumps(TALK)).messages == TALK
    # A line of a text file that is JSON of something else is a prompt.
    assert read_row("prompt", '{"a": 1}').messages == talk('{"a": 1}')


def test_texts_nest_no_deeper_than_they_are_followed():
    text = json.dumps(TALK)
    for _ in range(2):
        text = json.dumps(text)
    assert decoded(text) == TALK and decoded("[" * 5000) is None and decoded("") is None
