"""Compressed files, .ndjson, tables with tools in them, and names of inputs with a subset, a split
and a number of rows, shown on a stand-in for the hub."""

import json
import subprocess

import pyarrow as pa
import pytest

from coati.dataset.prepare.shard_plan import Files, count_rows
from coati.dataset.rows.formats import read_row
from coati.dataset.rows.input_files import find_files, find_sources, source_rows
from coati.dataset.rows.input_names import InputName, parse_input
from coati.dataset.rows.readers import decode, kind_of, read_rows
from coati.dataset.stream.row_sources import sources_of
from coati.recipes.prepared import held_out_split, is_raw
from coati.utils.logging import take_warnings
from tests.dataset.rows.test_format_files import TOOLS, round_of_calls, talk


def row(n: int) -> dict:
    return {"messages": talk(f"q{n}", "a" * (1 + n % 300))}


def lines(count: int) -> str:
    return "".join(json.dumps(row(n + 1)) + "\n" for n in range(count))


def zst(path, content: bytes) -> None:
    path.write_bytes(pa.compress(content, codec="zstd", asbytes=True))


def questions(paths) -> list[str]:
    return [found.messages[0]["content"] for _, found in source_rows(paths, "sft")]


def streamed(paths) -> None:
    for path in paths:
        sources_of(path)


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.ndjson.zst", "a.json.zst"])
def test_zst_files(name, tmp_path):
    text = lines(4000).encode()
    if name == "a.json.zst":
        text = json.dumps([row(n + 1) for n in range(4000)], indent=1).encode()
    zst(tmp_path / name, text)
    assert len(text) > 2 * (1 << 18) and kind_of(tmp_path / name) is not None
    assert questions([tmp_path]) == [f"q{n + 1}" for n in range(4000)]
    assert count_rows(tmp_path / name) == 4000
    (tmp_path / "a.jsonl").write_bytes(text)
    packed = list(read_rows(tmp_path / name))
    assert packed[17] == list(read_rows(tmp_path / "a.jsonl"))[17]


def test_zst_tables_and_texts(tmp_path):
    zst(tmp_path / "a.csv.zst", b"question,answer\n1 + 1?,2\n")
    zst(tmp_path / "b.txt.zst", b"Bonjour\n\nEncore\n")
    assert read_row("sft", next(read_rows(tmp_path / "a.csv.zst"))[1]).messages == talk(
        "1 + 1?", "2"
    )
    assert list(read_rows(tmp_path / "b.txt.zst")) == [(1, "Bonjour"), (3, "Encore")]


def test_zst_of_several_frames_as_its_own_program_writes_them(tmp_path):
    """Files that were packed in parts and put one after the other."""
    for name, text in (("a", lines(3)), ("b", lines(5))):
        (tmp_path / name).write_text(text)
        subprocess.run(["zstd", "-q", "--rm", tmp_path / name], check=True)
    both = (tmp_path / "a.zst").read_bytes() + (tmp_path / "b.zst").read_bytes()
    (tmp_path / "c.jsonl.zst").write_bytes(both)
    assert questions([tmp_path / "c.jsonl.zst"]) == ["q1", "q2", "q3", "q1", "q2", "q3", "q4", "q5"]


@pytest.mark.parametrize("damage", ["text", "cut", "spoiled"])
def test_a_damaged_zst_file_is_named(damage, tmp_path):
    path = tmp_path / "a.jsonl.zst"
    zst(path, lines(3000).encode())
    whole = path.read_bytes()
    cut = len(whole) // 2
    found = {
        "text": b"plain",
        "cut": whole[:cut],
        "spoiled": whole[:cut] + b"\0" * 99 + whole[cut:],
    }
    path.write_bytes(found[damage])
    with pytest.raises(
        ValueError, match="a.jsonl.zst: damaged or not a zst file .*compress it again"
    ):
        list(read_rows(path))


def test_ndjson(tmp_path):
    (tmp_path / "a.ndjson").write_text(lines(2))
    (tmp_path / "b.NDJSON").write_text(lines(1))
    assert questions([tmp_path]) == ["q1", "q2", "q1"]


def test_tables_give_tools_no_keys_of_each_other(tmp_path):
    """A table has one structure for all rows: what others have are nulls."""
    from pyarrow import parquet

    other = {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
    }
    added = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    rows = [
        {"tools": TOOLS, "messages": round_of_calls()},
        {
            "tools": [{"type": "function", "function": other}],
            "messages": [*talk("?"), {"role": "assistant", "content": "", "tool_calls": [added]}],
        },
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    [first, second] = [found for _, found in source_rows([tmp_path], "sft")]
    assert (first.messages, first.tools) == (round_of_calls(), TOOLS)
    assert second.tools[0]["function"] == other
    assert second.messages[1]["tool_calls"] == [added]
    assert first.unused == second.unused == {}


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("owner/name", ("owner/name", None, None, None)),
        ("owner/name:sub-set", ("owner/name", "sub-set", None, None)),
        ("owner/name@test", ("owner/name", None, "test", None)),
        ("owner/name#500", ("owner/name", None, None, 500)),
        ("owner/name:a/b@test#7", ("owner/name", "a/b", "test", 7)),
        ("rows.jsonl#7", ("rows.jsonl", None, None, 7)),
        ("a#b.jsonl", ("a#b.jsonl", None, None, None)),
    ],
)
def test_the_parts_of_a_name(name, parts):
    assert parse_input(name) == InputName(*parts)


def test_files_whose_names_look_like_that(tmp_path):
    for name in ("a#3", "b@train", "rows:x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text(lines(5))
        assert len(questions([tmp_path / name])) == 5
        assert len(questions([f"{tmp_path / name}#2"])) == 2
    with pytest.raises(ValueError, match="#0 reads no row"):
        find_files([f"{tmp_path / 'a#3'}#0"])
    with pytest.raises(ValueError, match="is no data set on the hub and no dataset_info.json, so"):
        find_files([f"{tmp_path / 'a#3'}:sub"])


def test_the_first_rows_of_an_input(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jsonl").write_text(lines(4))
    assert questions([f"{tmp_path}#6"]) == ["q1", "q2", "q3", "q4", "q1", "q2"]
    sources = find_sources([f"{tmp_path}#6", tmp_path / "c.jsonl", f"{tmp_path / 'c.jsonl'}#1"])
    files = Files(sources)
    assert files.counts == [4, 2, 0, 4, 1] and files.total == 11
    read = [decode(raw)["messages"][0]["content"] for _, _, raw in files.rows(3)]
    assert read == ["q4", "q1", "q2", "q1", "q2", "q3", "q4", "q1"]


@pytest.mark.parametrize("read", [questions, lambda paths: Files(find_sources(paths)), streamed])
def test_fewer_rows_than_are_wanted_are_said(read, tmp_path):
    (tmp_path / "few.jsonl").write_text(lines(3))
    path = tmp_path / "few.jsonl"
    for wanted, said in ((3, []), (5, [f"{path}: 5 rows are wanted, and only 3 are there"])):
        take_warnings()
        read([f"{path}#{wanted}"])
        assert take_warnings() == said


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder in place of the hub: NAME/SUBSET is a saved data set with splits."""
    import datasets

    datasets.disable_progress_bars()
    for subset in ("easy", "hard"):
        splits = {
            split: datasets.Dataset.from_list([row(n + first) for n in range(6)])
            for split, first in (("train", 10), ("test", 20), ("validation", 30))
        }
        datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "owner" / "sums" / subset))
    asked = []

    def load_dataset(name, subset=None, **more):
        asked.append((name, subset))
        return datasets.load_from_disk(str(tmp_path / name / (subset or "easy")))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return asked


def test_subset_split_and_rows_of_a_data_set_on_the_hub(hub):
    assert questions(["owner/sums:hard@test#2"]) == ["q20", "q21"]
    assert questions(["owner/sums@validation"]) == [f"q{30 + n}" for n in range(6)]
    assert questions(["owner/sums#3"]) == ["q10", "q11", "q12"]
    assert set(hub) == {("owner/sums", "hard"), ("owner/sums", None)}
    with pytest.raises(
        ValueError, match="has the splits train, test, validation; name one of them"
    ):
        find_files(["owner/sums@dev"])
    # The split in the name comes before --split, and is no set to evaluate on.
    assert questions_of_split("owner/sums@test", "validation") == ["q20"]
    assert is_raw("owner/sums@test#2") and held_out_split("owner/sums@test#2") is None
    assert held_out_split("owner/sums") == "validation"


def questions_of_split(name: str, split: str) -> list[str]:
    files = find_files([name], split)
    return [read_row("sft", next(read_rows(files[0]))[1]).messages[0]["content"]]


def test_a_list_of_inputs_on_the_hub(hub, tmp_path):
    info = {"x": {"hf_hub_url": "owner/sums", "subset": "hard", "split": "test", "num_samples": 2}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    assert questions([tmp_path / "dataset_info.json"]) == ["q20", "q21"]
