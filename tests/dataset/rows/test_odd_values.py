"""Values that rows have by accident: numbers out of range, texts in place of objects, halves of
characters, columns that stand twice. Each is read as what it means, or refused by name."""

import json
import math

import pytest

from coati.dataset.rows.formats import read_row
from coati.dataset.rows.input_files import decode
from coati.dataset.rows.readers import read_rows
from coati.dataset.rows.row_errors import RowError
from tests.dataset.rows.test_format_files import talk

HUGE = 10**400  # JSON has integers that are no floats


def response(**fields) -> dict:
    first, second = talk("q", "a")
    return {"messages": [first, {**second, **fields}]}


def refused(type: str, row: dict) -> RowError:
    with pytest.raises(RowError) as error:
        read_row(type, row)
    assert len(error.value.detail) < 300  # a value is quoted in part
    return error.value


NUMBERS = {
    "bad_weight": ("sft", lambda n: response(weight=n)),
    "bad_margin": (
        "preference",
        lambda n: {"prompt": "q", "chosen": "a", "rejected": "b", "margin": n},
    ),
    "bad_pair_weight": (
        "preference",
        lambda n: {"prompt": "q", "chosen": "a", "rejected": "b", "weight": n},
    ),
    "bad_label": ("kto", lambda n: {"prompt": "q", "completion": "a", "label": n}),
    "bad_scores": (
        "preference",
        lambda n: {"prompt": "q", "responses": ["a", "b"], "scores": [n, 1]},
    ),
}


@pytest.mark.parametrize("reason", NUMBERS)
@pytest.mark.parametrize("number", [HUGE, "many", {"a": 1}, [1]])
def test_a_number_that_is_none_is_refused(reason, number):
    type, row = NUMBERS[reason]
    assert refused(type, row(number)).reason == reason


@pytest.mark.parametrize("margin", [1e300, "-1e39", math.inf, math.nan])
def test_a_margin_that_rows_cannot_hold_is_refused(margin):
    assert refused("preference", NUMBERS["bad_margin"][1](margin)).reason == "bad_margin"


@pytest.mark.parametrize("weight", [-1, "-0.1", 1e300, math.inf, math.nan])
def test_a_weight_of_a_pair_that_is_none_is_refused(weight):
    assert refused("preference", NUMBERS["bad_pair_weight"][1](weight)).reason == "bad_pair_weight"


def test_votes_that_are_no_numbers_are_refused():
    row = {"prompt": "q", "response_0": "a", "response_1": "b"}
    assert refused("preference", row | {"better_response_id": HUGE}).reason == "bad_scores"


def choices(*texts, answer, **more) -> dict:
    return {"question": "q", "choices": list(texts), "answer": answer, **more}


@pytest.mark.parametrize(
    ("row", "letter"),
    [
        (choices("x", "y", answer=1), "B"),
        (choices("x", "y", answer="1"), "B"),
        (choices("x", "y", answer="y"), "B"),
        (choices("5", "7", answer="7"), "B"),
        (choices("5", "7", answer=7), "B"),
        # A text that is a choice names it; a number is an index.
        (choices("2", "1", "0", answer="2"), "A"),
        (choices("2", "1", "0", answer=2), "C"),
        (choices("x", "y", answer="²"), "²"),
    ],
)
def test_an_answer_names_a_choice_by_letter_text_or_index(row, letter):
    assert read_row("sft", row).messages[-1]["content"] == letter
    assert read_row("prompt", row).gt_answer == letter


@pytest.mark.parametrize("answer", [-1, 2])
@pytest.mark.parametrize("type", ["sft", "prompt"])
def test_an_index_of_no_choice_is_refused(type, answer):
    assert refused(type, choices("x", "y", answer=answer)).reason == "bad_scores"


def test_options_of_another_kind_are_no_choices():
    row = {"question": "q", "answer": "a", "options": {"temperature": 0.7, "top_p": 0.9}}
    found = read_row("sft", row)
    assert found.messages == talk("q", "a") and found.unused == {"options": True}
    row["options"] = {"option_1": "x", "(b)": "y"}
    assert read_row("sft", row).messages[0]["content"] == "q\n\noption_1. x\n(b). y"
    error = refused("sft", choices(*map(str, range(30)), answer="a"))
    assert "at most 26" in error.detail and "--columns choices=" in error.detail


@pytest.mark.parametrize("missing", [math.nan, math.inf])
def test_a_missing_number_is_neither_response_nor_truth(missing):
    assert "response" in refused("sft", {"prompt": "q", "response": missing}).detail
    assert refused("prompt", {"prompt": "q", "gt_answer": missing}).reason == "bad_gt_answer"
    assert read_row("prompt", {"question": "q", "answer": missing}).gt_answer is None


@pytest.mark.parametrize("text", ["", " ", "null", None])
def test_a_call_without_arguments_has_none(text):
    call = {"function": {"name": "f", "arguments": text}}
    found = read_row("sft", response(content=None, tool_calls=[call]))
    assert found.messages[1]["tool_calls"][0]["function"]["arguments"] == {}


def test_empty_lists_are_no_content_of_a_call_and_the_json_of_a_result():
    call = {"function": {"name": "f", "arguments": "{}"}}
    row = response(content=[], tool_calls=[call])
    row["messages"] += [{"role": "tool", "content": []}, *talk("q", "a")[1:]]
    found = read_row("sft", row).messages
    assert found[1]["content"] == "" and found[2] == {"role": "tool", "content": "[]"}
    row["messages"][2]["content"] = None
    assert "content (null)" in refused("sft", row).detail


HALF = r"\ud83d"


@pytest.mark.parametrize(
    "row",
    [
        response(tool_calls=[{"function": {"name": "f", "arguments": f'{{"a": "{HALF}"}}'}}]),
        response() | {"tools": f'[{{"name": "f", "description": "{HALF}"}}]'},
        response() | {"tools": f'{{"name": "f"}}, {{"name": "{HALF}"}}'},
        {"prompt": "q", "response": "a", "history": f'[["{HALF}", "b"]]'},
        {"messages": f"[{{'role': 'user', 'content': '{HALF}'}}]"},
        {"query": "q", "tools": "[]", "answers": f'[{{"name": "{HALF}", "arguments": {{}}}}]'},
    ],
    ids=["arguments", "tools", "tools in turn", "history", "messages", "calls"],
)
def test_half_a_character_in_a_text_of_json_is_refused(row):
    """No tokenizer and no file takes one."""
    raw = decode(json.dumps(row).encode())
    refused("sft", raw)
    if "messages" in row and not isinstance(row["messages"], list):
        return  # Python's escapes make no whole character of two halves
    whole = decode(json.dumps(row).replace(r"\\ud83d", r"\\ud83d\\ude00").encode())
    assert "😀" in json.dumps(vars(read_row("sft", whole)), ensure_ascii=False, default=str)


def nested(depth: int) -> str:
    return "[" * depth + "1" + "]" * depth


@pytest.mark.parametrize("depth", [250, 900, 100_000])
def test_what_is_nested_too_deeply_is_refused(depth):
    """Python's own limit would end the preparation somewhere behind the reader."""
    for place in ("meta", "tools", "history", "test_cases"):
        raw = json.dumps({"prompt": "q", "response": "a", place: "here"})
        with pytest.raises(RowError) as error:
            decode(raw.replace('"here"', nested(depth)).encode())
        assert error.value.reason == "bad_json"
    call = {"name": "f", "arguments": f'{{"a": {nested(depth)}}}'}
    assert refused("sft", response(function_call=call)).reason == "bad_tool_call"
    assert refused("sft", response() | {"tools": nested(depth)}).reason == "bad_tools"


def test_what_is_nested_less_deeply_is_tokenized():
    from coati.dataset.data_types import DATA_TYPES
    from tests.dataset.chat.family_templates import family

    call = {"name": "f", "arguments": {"a<|im_end|>": json.loads(nested(190))}}
    row = response(function_call=call) | {"meta": json.loads(nested(190))}
    found = read_row("sft", decode(json.dumps(row).encode()))
    (made, _), *_ = DATA_TYPES["sft"].tokenize(found, family("qwen3"), 4096)
    assert nested(190) in made["labels_decode"][0]


def test_columns_that_stand_twice_are_refused(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "twice.csv"
    path.write_text("prompt,response,response\nq,a,b\n")
    with pytest.raises(ValueError, match="twice.csv: has two columns response"):
        list(read_rows(path))
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    parquet.write_table(table, tmp_path / "twice.parquet")
    with pytest.raises(ValueError, match="two columns text"):
        list(read_rows(tmp_path / "twice.parquet"))
    path.write_text(",prompt,response,\n0,q,a,b\n")
    assert list(read_rows(path)) == [
        (2, {"column 1": "0", "prompt": "q", "response": "a", "column 4": "b"})
    ]


def test_bytes_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "binary.txt"
    path.write_bytes(b"\x80" * 300_000)
    found = list(read_rows(path, "file"))
    assert found and all(error.reason == "bad_text" for _, error in found)
    # A border between two pieces stands before a character, not in it.
    path.write_text("é" * 200_000)
    assert "".join(text for _, text in read_rows(path, "file")) == "é" * 200_000
