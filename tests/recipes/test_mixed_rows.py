"""Rows of texts and of conversations in one run: which a path holds, and all of them together."""

import json

import pytest

from coati.dataset.chat.plain_text import PlainText
from coati.dataset.data_types import type_of_row
from coati.dataset.prepare.preparation import prepare_dataset
from coati.recipes.eval_split import evaluation_mask
from coati.recipes.mixed_rows import check_whole, joined, type_of_path
from tests.end_to_end.inputs import SAMPLE, prepare, short_lines
from tests.tiny import tiny_tokenizer

TALK = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
TEXT = {"text": "Rivers run to the sea."}
ALPACA = {"instruction": "Add.", "input": "1, 2", "output": "3"}
BAD = {"messages": [{"role": "assistant", "content": "a"}]}
RAW = {
    "conversations": ([TALK], "sft"),
    "texts": ([TEXT], "text"),
    "alpaca, with the column text that it has": ([ALPACA | {"text": "### Instruction"}], "sft"),
    "texts with labels": ([TEXT | {"label": 1}], "text"),
    "source code": ([{"content": "x = 1", "path": "a.py"}], "text"),
    "source_target": ([{"source": "", "Target": "t"}], "text"),
    "a conversation after one that cannot be used": ([BAD, TALK], "sft"),
    "what is neither": ([{"words": 3}], "text"),
    "nothing": ([], "text"),
}


@pytest.mark.parametrize("case", RAW)
def test_the_type_of_raw_rows(tmp_path, case):
    rows, type = RAW[case]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert type_of_path(str(file), "text") == type
    assert type_of_path(str(tmp_path), "text") == type
    assert type_of_path(str(file), "sft") == "sft"  # as every other type is read by itself


def test_a_txt_file_is_text(tmp_path):
    (tmp_path / "a.txt").write_text(json.dumps(TALK))
    assert type_of_path(str(tmp_path / "a.txt"), "text") == "text"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "a.txt").write_text("of water and of stone " * 200)
    tokenizer = tiny_tokenizer()
    prepare_dataset(
        inputs=[folder / "a.txt"],
        tokenizer=tokenizer,
        template=PlainText(tokenizer),
        arrow_dir=folder / "text",
        type="text",
        max_length=64,
        num_bins=1,
        num_proc=1,
        show=None,
    )
    return {"text": str(folder / "text"), "sft": prepare(folder / "sft", short_lines(0, 20))}


def test_prepared_rows_say_their_type(prepared):
    assert {type: type_of_path(path, "text") for type, path in prepared.items()} == {
        "text": "text",
        "sft": "sft",
    }


def test_together_they_have_the_columns_that_training_reads(prepared):
    rows = joined([prepared["text"], prepared["sft"]], ["text", "sft"])
    sizes = [len(joined([path], [type])) for type, path in prepared.items()]
    assert len(rows) == sum(sizes) and min(sizes) > 5
    assert set(rows.column_names) == {
        *("input_ids", "labels", "inputs_decode", "seq_length", "seq_category")
    }
    assert type_of_row(rows[0]).name == "sft"
    assert rows[0]["labels"][:2] == [-100, rows[0]["input_ids"][1]]
    assert rows[len(rows) - 1]["labels"].count(-100) > 5
    assert "document" in joined([prepared["text"]], ["text"]).column_names
    held = evaluation_mask(rows, "text", 0.3, 42)
    assert held[: sizes[0]].any() and held[sizes[0] :].any() and 0 < held.mean() < 0.4


def test_pieces_are_never_cut_again(prepared):
    rows = joined([prepared["text"]], ["text"])
    check_whole(rows, "p", "text", 64, "dataset")
    said = r"--dataset p: \d+ of \d+ pieces of documents are longer than --max_length 63 "
    with pytest.raises(ValueError, match=said + r"\(the longest has 64 tokens\)"):
        check_whole(rows, "p", "text", 63, "dataset")
    check_whole(joined([prepared["sft"]], ["sft"]), "p", "sft", 8, "dataset")


def test_the_sample_of_conversations():
    assert type_of_path(str(SAMPLE), "text") == "sft"


def test_texts_among_weighted_conversations_weigh_one(prepared, tmp_path):
    rows = joined([prepared["sft"]], ["sft"])
    weights = [[0.5] * length for length in rows["seq_length"]]
    rows.add_column("loss_weights", weights).save_to_disk(str(tmp_path / "part-00000"))
    both = joined([prepared["text"], str(tmp_path)], ["text", "sft"])
    assert both[0]["loss_weights"] == [1.0] * both[0]["seq_length"]
    assert both[len(both) - 1]["loss_weights"] == weights[-1]
