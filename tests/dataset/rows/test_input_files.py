"""Every file and row format that is read, and what a bad row says."""

import gzip
import json
from functools import partial

import pytest

from coati.dataset.rows.formats import read_row
from coati.dataset.rows.input_files import decode, find_files, read_rows
from coati.dataset.rows.row_errors import RowError

read_sft = partial(read_row, "sft")
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
        {
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
            "id": 7,
        },
        {"instruction": "q", "input": "", "output": "a"},
        {"instruction": "q", "output": "a"},
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    ],
)
def test_accepted_shapes(row):
    assert read_sft(row).messages == ROUND


def test_alpaca_input_follows_the_instruction():
    assert (
        read_sft({"instruction": "Add.", "input": "1, 2", "output": "3"}).messages[0]["content"]
        == "Add.\n\n1, 2"
    )


def test_system_message_and_category_are_kept():
    row = read_sft({"messages": [{"from": "system", "content": "s"}, *ROUND], "category": "chat"})
    assert row.category == "chat" and [m["role"] for m in row.messages] == [
        "system",
        "user",
        "assistant",
    ]


def message(role="user", content="x") -> dict:
    return {"from": role, "content": content}


@pytest.mark.parametrize(
    ("row", "reason", "said"),
    [
        ({}, "wrong_keys", "messages"),
        ({"prompt": "x"}, "wrong_type", "found prompt: plain rows, for --type prompt, not sft"),
        ("x", "wrong_type", "found a text: plain rows"),
        (7, "wrong_keys", "found int"),
        ({"messages": "x"}, "wrong_keys", "messages must be a list"),
        ({"messages": ["x"]}, "wrong_keys", "message 0 must be an object"),
        ({"messages": [{"from": "user"}]}, "wrong_keys", "message 0 lacks content"),
        ({"messages": [{"content": "x"}]}, "wrong_keys", "message 0 lacks from (or role)"),
        ({"instruction": "x"}, "wrong_type", "they need instruction, output"),
        (
            {"messages": [message("tool")]},
            "roles_not_alternating",
            "message 0 is from tool, expected user: no call",
        ),
        ({"messages": [message(3)]}, "unknown_role", "3"),
        (
            {"messages": [message(), message()]},
            "roles_not_alternating",
            "message 1 is from user, expected assistant",
        ),
        (
            {"messages": [message("assistant")]},
            "roles_not_alternating",
            "message 0 is from assistant, expected user",
        ),
        (
            {"messages": [message(), message("gpt"), message("system")]},
            "roles_not_alternating",
            "message 2",
        ),
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
    path.write_bytes(
        b"\xef\xbb\xbf"
        + json.dumps({"messages": ROUND}).encode()
        + b"\n\n\r\n"
        + b'{"messages": [\n'
    )
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
    with pytest.raises(RowError, match="no known row format"):
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
    (tmp_path / "a.doc").write_text("x")
    with pytest.raises(ValueError, match="a.doc: unknown kind"):
        find_files([tmp_path / "a.doc"])
    (tmp_path / "preparation.json").write_text("{}")
    with pytest.raises(
        ValueError, match="is prepared already; pass it to a trainer with --dataset"
    ):
        find_files([tmp_path])
    with pytest.raises(ValueError, match="no input"):
        find_files([])


def test_csv_records_stand_on_their_first_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'\xef\xbb\xbfinstruction,input,output\n"Say ""hi"",\nplease",,a\n'
        b'q,,a,extra\n\nq,\xff,a\nq,,"b, c"\n'
    )
    found = list(read_rows(path))
    assert [line for line, _ in found] == [2, 4, 6, 7]
    assert read_sft(found[0][1]).messages[0]["content"] == 'Say "hi",\nplease'
    assert found[1][1].reason == "bad_csv"
    assert "4 fields under 3 columns (instruction, input, output)" in str(found[1][1])
    assert "UTF-8" in str(found[2][1]) and read_sft(found[3][1]).messages[1]["content"] == "b, c"


def test_tab_separated_and_compressed_tables(tmp_path):
    (tmp_path / "a.tsv").write_text("question\tgt_answer\n1 + 1?\t2\n")
    with gzip.open(tmp_path / "b.csv.gz", "wt") as file:
        file.write("question,gt_answer\n1 + 1?,2\n")
    for name in ("a.tsv", "b.csv.gz"):
        row = read_row("prompt", list(read_rows(tmp_path / name))[0][1])
        assert (row.messages, row.gt_answer) == ([{"role": "user", "content": "1 + 1?"}], "2")


def test_text_lines_are_prompts(tmp_path):
    (tmp_path / "a.txt").write_bytes("Bonjour\r\n\nça va ?\n".encode() + b"\xff\n")
    *good, (line, bad) = read_rows(tmp_path / "a.txt")
    assert good == [(1, "Bonjour"), (3, "ça va ?")] and line == 4 and bad.reason == "bad_json"


def test_text_beside_other_data_is_a_note(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("q\n")
    assert [path.name for path in find_files([tmp_path])] == ["prompts.txt"]
    (tmp_path / "a.csv").write_text("prompt\nq\n")
    assert [path.name for path in find_files([tmp_path])] == [
        "a.csv"
    ] and "prompts.txt" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [b"plain text", gzip.compress(b"x" * 9999)[:30]])
def test_a_damaged_gzip_file_is_named(damage, tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(damage)
    with pytest.raises(ValueError, match="a.jsonl.gz: damaged or not a gzip file"):
        list(read_rows(tmp_path / "a.jsonl.gz"))


@pytest.fixture
def saved(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_list(
        [{"messages": [{**ROUND[0], "content": f"q{n}"}, ROUND[1]]} for n in range(5)]
    )
    rows.save_to_disk(str(tmp_path / "one"), num_shards=2)
    parts = {"train": rows.select([3, 1]), "test": rows.select([0])}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "splits"))
    return tmp_path


def questions(files) -> list[str]:
    return [read_sft(row).messages[0]["content"] for file in files for _, row in read_rows(file)]


def test_saved_data_sets_in_their_order(saved, capsys):
    assert questions(find_files([saved / "one"])) == ["q0", "q1", "q2", "q3", "q4"]
    assert questions(find_files([saved / "splits"])) == ["q3", "q1"]
    assert "the split train is read (of train, test)" in capsys.readouterr().err
    assert questions(find_files([saved / "splits"], split="test")) == ["q0"]
    with pytest.raises(
        ValueError, match="has the splits train, test; name one of them with --split"
    ):
        find_files([saved / "splits"], split="dev")
    assert len(questions(find_files([saved]))) == 7


def test_files_named_after_splits(tmp_path, capsys):
    for name in (
        "base/train.jsonl",
        "base/test.jsonl",
        "more/train/a.jsonl",
        "train-00000-of-00001.jsonl",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("")
    assert len(find_files([tmp_path])) == 4
    assert "files of test and train are all read; choose with --split" in capsys.readouterr().err
    assert [path.name for path in find_files([tmp_path], split="test")] == ["test.jsonl"]
    assert len(find_files([tmp_path], split="train")) == 3
    with pytest.raises(ValueError, match="no file is named after the split dev; found test, train"):
        find_files([tmp_path], split="dev")


def test_the_name_of_a_data_set(saved, monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, subset=None, data_dir=None):
        asked.append((name, subset, data_dir))
        if subset == "harmless-base":
            raise ValueError("BuilderConfig not found")
        if name == "nobody/nothing":
            raise ConnectionError("offline")
        return datasets.load_from_disk(str(saved / "splits"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(saved)
    assert questions(find_files(["Anthropic/hh-rlhf:harmless-base"])) == ["q3", "q1"]
    assert questions(find_files(["owner/name"], split="test")) == ["q0"]
    assert asked == [
        ("Anthropic/hh-rlhf", "harmless-base", None),
        ("Anthropic/hh-rlhf", None, "harmless-base"),
        ("owner/name", None, None),
    ]
    with pytest.raises(
        ValueError, match="no such file or folder.*a data set that can be loaded here .offline"
    ):
        find_files(["nobody/nothing"])
    (saved / "data").mkdir()
    for path in ("data/sft.jsonl", "../data", "/data/sft", "sft", "data/sft", "nobody/a.jsonl"):
        with pytest.raises(
            ValueError, match="there is no such file or folder; expected data files .*zst\\)\\)$"
        ):
            find_files([path])
