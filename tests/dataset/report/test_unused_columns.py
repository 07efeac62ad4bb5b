"""What was not read: counted by name on the screen, in report.json and on the page, warned of where
it carries content, and an error with --strict_columns."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from coati.dataset import load_tokenized_dataset, setup_conversation_template
from coati.dataset.clean.cleaning import Cleaning
from coati.dataset.clean.text_normalization import canonical_text
from coati.dataset.prepare.preparation import prepare_dataset
from coati.dataset.report.html import page
from coati.dataset.report.row_stats import LONGEST_PATH, MOST_COLUMNS, RowStats
from coati.dataset.rows.column_names import Layout, parse_columns
from coati.dataset.rows.formats import read_row
from tests.dataset.makers import chatml_tokenizer
from tests.dataset.report.test_report import ROWS, Tags, message, prepared

REST = {"id": 7, "images": ["a.png"], "meta": {"lang": "en"}, "context": None}


def again(folder: Path, **settings) -> dict:
    """A second preparation of the same file into the same folders."""
    tokenizer = chatml_tokenizer()
    return prepare_dataset(
        type="sft",
        inputs=[folder / "rows.jsonl"],
        tokenizer=tokenizer,
        tokenizer_name="tiny",
        template=setup_conversation_template(tokenizer, {}),
        arrow_dir=folder / "arrow",
        jsonl_dir=folder / "jsonl",
        cache_dir=folder / "cache",
        num_proc=1,
        num_bins=1,
        show=None,
        **settings,
    )


def rows(count: int, **more) -> list[dict]:
    return [{**ROWS["sft"](i), **more} for i in range(count)]


def test_the_report_names_what_was_not_read(tmp_path, capsys):
    data = [*rows(50, **REST), *rows(10)]
    data[3]["messages"][1]["refusal"] = "none"
    report = prepared(tmp_path, data, show=print)
    assert report["unused_columns"] == {"id": 50, "images": 50, "meta": 50, "messages[].refusal": 1}
    first = f"{tmp_path / 'rows.jsonl'}:1"
    assert report["unused_content"] == {"images": {"rows": 50, "first": first}}
    said = (
        f"images is not read, in 50 of 60 rows (the first: {first}); if it is not to be read, say "
    )
    assert [text for text in report["warnings"] if text.startswith(said)]
    printed = capsys.readouterr()
    assert (
        "columns and fields that were not read, in rows: id 50, images 50, meta 50" in printed.out
    )
    assert said in printed.err
    texts = Tags(page(report)).text
    assert {"messages[].refusal", "meta"} <= set(texts) and any(said in text for text in texts)
    saved = json.loads((tmp_path / "jsonl" / "report.json").read_text())
    assert saved["unused_columns"] == report["unused_columns"]


def test_nothing_is_said_of_plain_rows(tmp_path, capsys):
    for type, make in ROWS.items():
        report = prepared(tmp_path / type, [make(i) for i in range(60)], type, show=print)
        assert report["unused_columns"] == report["unused_content"] == {}
    assert "not read" not in capsys.readouterr().out


def test_strict_columns_end_the_preparation(tmp_path):
    said = (
        r"is not read, and --strict_columns:\n  images \(the first: .*rows.jsonl:1\)\n.*'images='$"
    )
    with pytest.raises(ValueError, match=said):
        prepared(tmp_path, rows(60, **REST), strict_columns=True)
    assert not (tmp_path / "arrow").exists() and not (tmp_path / "jsonl").exists()
    # The remedy in the message; a column without content stops nothing.
    report = prepared(tmp_path, rows(60, **REST), strict_columns=True, columns={"images": ""})
    assert report["unused_columns"] == {"id": 60, "meta": 60}
    # What was prepared without the flag is not taken for clean by it.
    prepared(tmp_path / "b", rows(60, **REST))
    with pytest.raises(ValueError, match="and --strict_columns"):
        again(tmp_path / "b", strict_columns=True)


@pytest.mark.parametrize("as_list", [False, True])
def test_the_error_names_a_way_to_leave_out_what_is_nested(as_list, tmp_path):
    """Fields of messages as well, and what would be read: a thought."""
    talk = [
        {"role": "user", "content": "q", "images": ["a.png"]},
        {
            "role": "assistant",
            "content": "a",
            "reasoning_content": "hm",
            "tool_results": ["x"],
            "meta": {"labels": [1]},
        },
    ]
    data = [talk if as_list else {"messages": talk} for _ in range(60)]
    with pytest.raises(ValueError) as refused:
        prepared(tmp_path, data, strict_columns=True)
    (advice,) = [line for line in str(refused.value).splitlines() if "--columns" in line]
    words = shlex.split(advice.partition("leave them out with --columns ")[2])
    assert sorted(words) == ["messages[].images=", "messages[].tool_results="]
    named = parse_columns(words)
    report = prepared(tmp_path / "b", data, strict_columns=True, columns=named)
    assert report["unused_columns"] == {"messages[].meta": 60} and not report["warnings"][1:]
    row = data[0]
    assert read_row("sft", row).messages[1]["reasoning_content"] == "hm"
    layout = Layout({"messages[].reasoning_content": ""})
    assert "reasoning_content" not in read_row("sft", row, layout=layout).messages[1]


def test_what_stands_beside_a_named_path_is_left_out_by_its_own(tmp_path):
    data = [{"ask": f"q{i}", "meta": {"reply": f"a{i}", "images": ["p"]}} for i in range(60)]
    named = parse_columns(["prompt=ask,response=meta.reply"])
    with pytest.raises(ValueError, match=r"with --columns 'meta.images='$"):
        prepared(tmp_path, data, strict_columns=True, columns=named)
    prepared(tmp_path, data, strict_columns=True, columns=named | {"meta.images": ""})


def test_named_columns_are_part_of_what_rows_were_made_from(tmp_path):
    data = [{"q": f"q{i}", "a": f"a{i}", "b": f"b{i}"} for i in range(60)]
    report = prepared(tmp_path, data, columns={"prompt": "q", "response": "a"})
    assert report["columns"] == {"prompt": "q", "response": "a"}
    made = load_tokenized_dataset(str(tmp_path / "arrow")).data.table.to_pylist()
    assert made[5]["labels_decode"] == ["a5<|im_end|>"] and report["unused_columns"] == {"b": 60}
    assert again(tmp_path, columns={"prompt": "q", "response": "a"}) == report
    with pytest.raises(ValueError, match="made from something else: columns was .*'a'.*'b'"):
        again(tmp_path, columns={"prompt": "q", "response": "b"})
    with pytest.raises(ValueError, match="made from something else: columns was .*, now None"):
        again(tmp_path)
    plain = prepared(tmp_path / "plain", rows(60))
    assert "columns" not in plain


def test_a_tree_becomes_a_row_for_each_of_its_conversations(tmp_path):
    def tree(i: int) -> dict:
        replies = [{"role": "assistant", "text": f"a{i}.{k}", "rank": k} for k in range(2)]
        return {"prompt": {"role": "prompter", "text": f"q{i}", "replies": replies}}

    data = [tree(i) for i in range(30)]
    report = prepared(tmp_path, data, num_bins=2)
    assert (report["rows_read"], report["rows_kept"], report["rows_written"]) == (60, 60, 60)
    assert report["shapes"] == {"oasst": 60}
    made = [row["labels_decode"] for row in load_tokenized_dataset(str(tmp_path / "arrow"))]
    assert made[:3] == [["a0.0<|im_end|>"], ["a0.1<|im_end|>"], ["a1.0<|im_end|>"]]
    pairs = prepared(tmp_path / "pairs", data, "preference")
    assert pairs["rows_written"] == 30
    # A tree that repeats another one goes as a whole.
    fewer = prepared(tmp_path / "fewer", [*data, data[0]], cleaning=Cleaning(deduplicate=True))
    assert (fewer["rows_kept"], fewer["dropped"]["duplicate"]["rows"]) == (60, 1)


def test_what_a_message_holds_beside_text_tells_rows_apart(tmp_path):
    for city in ("Ulm", "Bonn"):
        call = json.dumps({"name": "get_weather", "arguments": {"city": city}})
        row = {"messages": [message("human", "?"), message("function_call", call)]}
        assert city.lower() in canonical_text(read_row("sft", row))
    thought = {"messages": [message("human", "?"), message("gpt", "<think>\na\n</think>\n\n4")]}
    other = {"messages": [message("human", "?"), message("gpt", "<think>\nb\n</think>\n\n4")]}
    report = prepared(tmp_path, [thought, other, thought], cleaning=Cleaning(deduplicate=True))
    assert report["rows_kept"] == 2 and report["dropped"]["duplicate"]["rows"] == 1


def test_names_without_end_do_not_fill_the_memory():
    stats = RowStats()
    for n in range(1000):
        stats.leave_out({f"{n}" * 100: n % 2 == 0}, f"f:{n}")
    other = RowStats()
    other.merge(stats)
    for found in (stats, other):
        assert len(found.unused) <= MOST_COLUMNS + 2 and found.unused.total() == 1000
        assert found.missing.total() == 500 and max(map(len, found.unused)) <= LONGEST_PATH
        assert set(found.first_missing) == set(found.missing)
    assert replace(stats).unused["others"] > 700


def test_rows_prepared_by_an_earlier_release_say_so(tmp_path, capsys):
    prepared(tmp_path, rows(60))
    path = tmp_path / "arrow" / "preparation.json"
    found = json.loads(path.read_text())
    del found["report"]["unused_columns"], found["report"]["unused_content"]
    path.write_text(json.dumps(found))
    again(tmp_path)
    assert "were prepared by an earlier release" in capsys.readouterr().err
