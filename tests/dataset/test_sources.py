"""Every file and row shape that is read, and what a bad row says."""

import gzip
import json

import pytest

from coati.dataset.reasons import RowError
from coati.dataset.shapes import READERS
from coati.dataset.sources import decode, find_files, read_rows

read_sft = READERS["sft"]
ROUND = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def rows(path) -> list:
    return [(line, read_sft(decode(row)).messages) for line, row in read_rows(path)]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"from": "human", "content": "q"}, {"from": "assistant", "content": "a"}]},
        {"messages": [{"from": "user", "content": "q"}, {"from": "gpt", "content": "a"}]},
        {"messages": [{"role": "User", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"messages": ROUND + [{"role": "user", "content": "left out"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "id": 7},
        {"instruction": "q", "input": "", "output": "a"},
        {"instruction": "q", "output": "a"},
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    ],
)
def test_accepted_shapes(row):
    assert read_sft(row).messages == ROUND


def test_alpaca_input_follows_the_instruction():
    assert read_sft({"instruction": "Add.", "input": "1, 2", "output": "3"}).messages[0]["content"] == "Add.\n\n1, 2"


def test_system_message_and_category_are_kept():
    row = read_sft({"messages": [{"from": "system", "content": "s"}, *ROUND], "category": "chat"})
    assert row.category == "chat" and [m["role"] for m in row.messages] == ["system", "user", "assistant"]


def message(role="user", content="x") -> dict:
    return {"from": role, "content": content}


@pytest.mark.parametrize(
    ("row", "reason", "said"),
    [
        ({}, "wrong_keys", "messages"),
        ({"text": "x"}, "wrong_type", "found text: plain rows, for --type prompt, not sft"),
        ("x", "wrong_type", "found a text: plain rows"),
        (7, "wrong_keys", "found int"),
        ({"messages": "x"}, "wrong_keys", "messages must be a list"),
        ({"messages": ["x"]}, "wrong_keys", "message 0 must be an object"),
        ({"messages": [{"from": "user"}]}, "wrong_keys", "message 0 lacks content"),
        ({"messages": [{"content": "x"}]}, "wrong_keys", "message 0 lacks from (or role)"),
        ({"instruction": "x"}, "wrong_type", "they need instruction, output"),
        ({"messages": [message("tool")]}, "unsupported_role", "'tool'"),
        ({"messages": [message(3)]}, "unknown_role", "3"),
        ({"messages": [message(), message()]}, "roles_not_alternating", "message 1 is from user, expected assistant"),
        ({"messages": [message("assistant")]}, "roles_not_alternating", "message 0 is from assistant, expected user"),
        ({"messages": [message(), message("gpt"), message("system")]}, "roles_not_alternating", "message 2"),
        ({"messages": [message(content=["x"])]}, "content_not_text", "list"),
        ({"messages": []}, "empty_conversation", "empty"),
        ({"messages": [message("system")]}, "no_assistant_turn", "system"),
        ({"messages": [message()]}, "no_assistant_turn", "user"),
        ({"messages": [message(), message("gpt", " \n")]}, "empty_answer", "message 1"),
        ({"instruction": "x", "output": ""}, "empty_answer", "message 1"),
    ],
)
def test_bad_rows_say_what_is_wrong(row, reason, said):
    with pytest.raises(RowError) as error:
        read_sft(row)
    assert error.value.reason == reason and said in error.value.detail


def test_lines_are_counted_with_the_blank_ones(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"messages": ROUND}).encode() + b"\n\n\r\n" + b'{"messages": [\n')
    found = list(read_rows(path))
    assert [line for line, _ in found] == [1, 4] and read_sft(decode(found[0][1])).messages == ROUND
    with pytest.raises(RowError) as error:
        decode(found[1][1])
    assert error.value.reason == "bad_json" and "column" in error.value.detail


def test_a_line_that_is_not_utf8(tmp_path):
    with pytest.raises(RowError, match="not UTF-8 text \\(byte 1\\)"):
        decode(b'"\xff"')


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_json_array_in_any_layout(name, tmp_path):
    row = {"messages": ROUND}
    for text, lines in (
        (json.dumps([row, row]), [1, 1]),
        (json.dumps([row, row], indent=2), [2, 14]),
        ("[\n" + json.dumps(row) + ",\n" + json.dumps(row) + "\n]\n", [2, 3]),
        (json.dumps(row) + "\n" + json.dumps(row) + "\n", [1, 2]),
        (json.dumps(ROUND) + "\n" + json.dumps(ROUND), [1, 2]),
    ):
        (tmp_path / name).write_text(text)
        assert rows(tmp_path / name) == [(line, ROUND) for line in lines], text


def test_a_broken_array_keeps_the_rows_before_the_break(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[\n" + json.dumps({"messages": ROUND}) + ",\n{'messages': 1}\n]")
    (first, row), (line, broken) = list(read_rows(path))
    assert first == 2 and read_sft(decode(row)).messages == ROUND and line == 3
    with pytest.raises(RowError, match="not JSON"):
        decode(broken)


def test_gz_and_parquet(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    table = [{"messages": ROUND, "category": "a"}, {"messages": None, "category": "b"}]
    parquet.write_table(pa.Table.from_pylist(table), tmp_path / "a.parquet")
    (_, first), (line, second) = list(read_rows(tmp_path / "a.parquet"))
    assert read_sft(first).messages == ROUND and line == 2
    with pytest.raises(RowError, match="no known row shape"):
        read_sft(second)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(json.dumps({"messages": ROUND}) + "\n")
    assert rows(tmp_path / "a.jsonl.gz") == [(1, ROUND)]
    (tmp_path / "broken.parquet").write_text("no")
    with pytest.raises(ValueError, match="broken.parquet: not a readable parquet file"):
        list(read_rows(tmp_path / "broken.parquet"))


def test_folders_are_read_in_all_depths_and_in_order(tmp_path, capsys):
    for name in ("b/x.jsonl", "a.json", "a.parquet", "b/notes.txt", ".hidden.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    found = [str(path.relative_to(tmp_path)) for path in find_files([tmp_path])]
    assert found == ["a.json", "a.parquet", "b/x.jsonl"] and "notes.txt" in capsys.readouterr().err


def test_paths_without_data_are_named(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        find_files([tmp_path / "absent"])
    with pytest.raises(ValueError, match="holds no data file.*found nothing"):
        find_files([tmp_path])
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match="a.csv: unknown kind"):
        find_files([tmp_path / "a.csv"])
    with pytest.raises(ValueError, match="no input"):
        find_files([])
