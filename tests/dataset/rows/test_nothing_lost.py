"""Whatever stands beside or inside a row is rendered, or named among what was not read, or the row
is refused by name: random fields in random places."""

import copy
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coati.dataset.rows.column_names import Layout, parse_columns
from coati.dataset.rows.column_use import carries
from coati.dataset.rows.formats import read_row
from coati.dataset.rows.row_errors import RowError
from tests.dataset.rows.test_format_files import EXPECTED, rows_of, talk
from tests.dataset.rows.test_formats import KTO, PREFERENCE, PROMPT, SFT

ROWS = [
    *[("sft", row) for _, row, _ in SFT],
    *[("prompt", row) for _, row, _ in PROMPT],
    *[("preference", row) for _, row, *_ in PREFERENCE],
    *[("kto", row) for _, row, *_ in KTO],
    *[(name.partition("_")[0], row) for name in EXPECTED for row in rows_of(name)],
]
ROWS = [(type, row) for type, row in ROWS if isinstance(row, dict)]
MARK = "kept_or_named_7f3a"
# Names that nobody knows, and such as mean something elsewhere.
NAMES = (
    "zzz note "
    "reasoning_content reasoning thinking thought tool_calls function_call tools functions "
    "weight train loss loss_weight train_detail images image audio name tool_call_id role from "
    "content value text type id system system_prompt context choices options history input answer "
    "solution label labels kto_tag gt_answer ground_truth reward_model test_cases category margin "
    "chosen rejected rejected_response response completion prompt question messages conversations "
    "score rank replies"
).split()
SHAPES = [
    lambda mark: mark,
    lambda mark: [mark],
    lambda mark: {"inner": mark},
    lambda mark: [{"inner": mark}],
    lambda mark: {"text": mark},
    lambda mark: [{"type": "text", "text": mark}],
    lambda mark: [{"type": "picture", "url": mark}],
    lambda mark: [{"role": "user", "content": mark}],
    lambda mark: json.dumps([{"role": "user", "content": mark}]),
    lambda mark: [{"name": mark, "arguments": {"a": 1}}],
]


def objects_in(value) -> list[dict]:
    """Every object in ``value``, itself first; not those below schemas and arguments, which are
    handed on whole."""
    found = []
    if isinstance(value, dict):
        found.append(value)
        for key, inner in value.items():
            if key not in ("parameters", "arguments", "input"):
                found += objects_in(inner)
    elif isinstance(value, list):
        for inner in value:
            found += objects_in(inner)
    return found


def whole(found) -> str:
    """All that is handed on of a row, branches included."""
    kept = {name: value for name, value in vars(found).items() if name not in ("unused", "format")}
    kept["branches"] = [whole(branch) for branch in found.branches]
    return json.dumps(kept, ensure_ascii=False, default=str)


@settings(max_examples=600, deadline=None)
@given(
    which=st.integers(0, len(ROWS) - 1),
    place=st.integers(0, 1000),
    name=st.sampled_from(NAMES),
    shape=st.integers(0, len(SHAPES) - 1),
)
def test_a_field_anywhere_is_kept_or_named(which, place, name, shape):
    type, row = ROWS[which]
    row = copy.deepcopy(row)
    objects = objects_in(row)
    target = objects[place % len(objects)]
    if name in target:
        return
    target[name] = SHAPES[shape](MARK)
    try:
        found = read_row(type, row)
    except RowError as error:
        assert error.detail  # refused by name
        return
    assert MARK in whole(found) or is_named(name, row, found), (type, row, found)


def is_named(name: str, row: dict, found) -> bool:
    """Whether the report tells of the field, or of the turn that it stands in."""
    if found.unanswered or "turns after the last response" in found.unused:
        return True
    return any(name in path or _stands_in(path, row) for path in found.unused)


def _stands_in(path: str, row: dict) -> bool:
    """Whether the mark is somewhere below the column that ``path`` names; of a row that was put
    together, the columns are its parts'."""
    top = path.partition(".")[0].partition("[")[0].partition(" ")[0]
    return MARK in json.dumps(row.get(top, row), default=str)


def test_all_names_at_every_object_of_every_row():
    """The same without chance for the first shape: some ten thousand rows."""
    for type, original in ROWS:
        for place in range(len(objects_in(original))):
            for name in random.Random(place).sample(NAMES, 12):
                row = copy.deepcopy(original)
                target = objects_in(row)[place]
                if name in target:
                    continue
                target[name] = MARK
                try:
                    found = read_row(type, row)
                except RowError:
                    continue
                told = MARK in whole(found) or is_named(name, row, found)
                assert told, (type, name, row, found)


CONTENT = {"thoughts": "reasoning_trace", "images": "images", "audio": "input_audio"} | {
    "system prompt": "system_prompt",
    "context": "context",
    "choices": "choices",
    "ground truth": "ground_truth",
    "history": "history",
    "tools": "functions",
}


@pytest.mark.parametrize("name", CONTENT.values())
def test_what_usually_carries_content_is_told_from_the_rest(name):
    assert carries(name) and carries(f"messages[].{name}", whole=False)
    assert not carries("id") and not carries("source") and not carries("metadata.created")
    assert carries("label") and not carries("label", whole=False)


def test_content_that_stands_in_the_row_anyway_is_not_missed():
    row = {"messages": talk("1 + 2 = ?", "It is 3."), "context": "1 + 2 = ?", "answer": "3"}
    assert read_row("sft", row).unused == {"context": False, "answer": False}
    assert read_row("sft", row | {"context": "Sums"}).unused == {"context": True, "answer": False}
    inner = [{"role": "user", "content": [["x"]]}]
    assert read_row("sft", row | {"history": inner}).unused["history"] is True
    # Nothing is told of what holds nothing, as tables have it.
    empty = {"context": None, "images": [], "tools": "", "meta": {"a": None}}
    assert read_row("sft", {"messages": talk("q", "a"), **empty}).unused == {}


def test_fields_of_messages_and_what_follows_the_last_response_are_named():
    row = {
        "messages": [
            {"role": "user", "content": "q", "images": ["a.png"]},
            {"role": "assistant", "content": "a", "refusal": None, "model": "m"},
            {"role": "user", "content": "left out"},
        ],
        "system": "Not read: the messages have one.",
    }
    row["messages"].insert(0, {"role": "system", "content": "s"})
    assert read_row("sft", row).unused == {
        "turns after the last response": False,
        "messages[].images": True,
        "messages[].model": False,
        "system": True,
    }


def test_fields_of_what_is_written_as_text_are_named():
    call = '{"name": "f", "arguments": {}, "zzz": 1}'
    rows = [
        {"question": "q", "answer": f"<tool_call>\n{call}\n</tool_call>"},
        {"instruction": "q", "output": f"<tool_call>{call}</tool_call>"},
        {"conversations": [{"human": "q", "assistant": f"<tool_call>{call}</tool_call>"}]},
        {"chat": f"USER: q\n\n\nASSISTANT: <functioncall> {call}"},
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "function_call", "content": call},
            ]
        },
        {"query": "q", "tools": '[{"name": "f"}]', "answers": f"[{call}]"},
    ]
    for row in rows:
        found = read_row("sft", row)
        assert found.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}
        assert [path.rpartition(".")[2] for path in found.unused] == ["zzz"]
    past = [{"role": "user", "content": "a", "zzz": 1}, {"role": "assistant", "content": "b"}]
    found = read_row("sft", {"query": "q", "response": "r", "history": past})
    assert found.messages == talk("a", "b", "q", "r") and found.unused == {"history[].zzz": False}


NAMED = {
    "prompt=task.ask,response=tries.1.say": {
        "task": {"ask": "q", "by": {"name": "Ann"}},
        "tries": [{"say": "x"}, {"say": "a", "seen": [{"at": 1}]}],
    },
    "messages=data.turns": {"data": {"turns": talk("q", "a"), "lang": "en"}, "id": 7},
    "prompt=q,response=a,tools=t": {"q": "q", "a": "a", "t": [{"name": "f", "parameters": {}}]},
}


@pytest.mark.parametrize("flag", NAMED)
@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_nothing_is_lost_beside_named_columns(flag, shape):
    layout = Layout(parse_columns([flag]))
    for place in range(len(objects_in(NAMED[flag]))):
        for name in NAMES:
            row = copy.deepcopy(NAMED[flag])
            target = objects_in(row)[place]
            if name in target:
                continue
            target[name] = SHAPES[shape](MARK)
            try:
                found = read_row("sft", row, layout=layout)
            except RowError as error:
                assert error.detail
                continue
            told = MARK in whole(found) or any(name in path for path in found.unused)
            assert told or is_named(name, row, found), (name, row, found)
