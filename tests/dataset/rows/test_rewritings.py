"""The samples of examples/data, and the same rows written in every other format and kind of file:
identical token ids, labels and masks."""

import csv
import gzip
import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest

from coati.dataset import load_tokenized_dataset, setup_conversation_template
from coati.dataset.data_types import DATA_TYPES
from coati.dataset.prepare.preparation import prepare_dataset
from coati.dataset.rows.formats import read_row
from coati.dataset.rows.input_files import find_files
from coati.dataset.rows.readers import decode, read_rows
from tests.dataset.makers import chatml_tokenizer

DATA = Path(__file__).parents[3] / "examples" / "data"
SAMPLES = {
    "sft": ("sft", "sft_eval", "ptx"),
    "preference": ("preference", "preference_eval"),
    "kto": ("kto",),
    "prompt": ("prompt",),
}
ROLES = {"human": "user", "assistant": "assistant"}


@lru_cache
def sample(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").open(encoding="utf-8")]


@pytest.fixture(scope="module")
def conversation():
    return setup_conversation_template(chatml_tokenizer(), {})


def tokenized(type: str, rows: list, conversation) -> tuple[list, list[dict]]:
    """All rows as they are read, whatever their format and what was left out at their end, and
    every column of the first 40 training rows."""
    read = [replace(read_row(type, row), format="", unanswered=False) for row in rows]
    return read, [
        columns
        for row in read[:40]
        for columns, _ in DATA_TYPES[type].tokenize(row, conversation, 4000)
    ]


def openai(messages: list[dict]) -> list[dict]:
    return [{"role": ROLES[m["from"]], "content": m["content"]} for m in messages]


def sharegpt(messages: list[dict]) -> list[dict]:
    return [
        {"from": {"assistant": "gpt"}.get(m["from"], m["from"]), "value": m["content"]}
        for m in messages
    ]


def dialogue(messages: list[dict]) -> str:
    speakers = {"human": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{speakers[m['from']]}: {m['content']}" for m in messages)


def one_round(row: dict) -> bool:
    return len(row.get("messages", ())) == 2


SFT = {
    "openai": lambda row: {"messages": openai(row["messages"])},
    "message list": lambda row: openai(row["messages"]),
    "sharegpt": lambda row: {"id": "x", "conversations": sharegpt(row["messages"])},
    "trl": lambda row: {
        "prompt": openai(row["messages"][:-1]),
        "completion": openai(row["messages"][-1:]),
    },
}
PREFERENCE = {
    "hh-rlhf": lambda row: {
        side: dialogue(row["context"] + row[side]) for side in ("chosen", "rejected")
    },
    "rm-static": lambda row: {
        "prompt": dialogue(row["context"]) + "\n\nAssistant:",
        "response": " " + row["chosen"][0]["content"],
        **{side: " " + row[side][0]["content"] for side in ("chosen", "rejected")},
    },
    "trl": lambda row: {
        "prompt": openai(row["context"]),
        **{side: openai(row[side]) for side in ("chosen", "rejected")},
    },
    "trl without a prompt": lambda row: {
        side: openai(row["context"] + row[side]) for side in ("chosen", "rejected")
    },
}
KTO = {
    "trl": lambda row: {
        "prompt": openai(row["prompt"]),
        "completion": openai([row["completion"]]),
        "label": row["label"],
    },
    "trl text": lambda row: {
        "prompt": dialogue(row["prompt"]) + "\n\nAssistant:",
        "completion": " " + row["completion"]["content"],
        "label": int(row["label"]),
    },
}
PROMPT = {
    "openai": lambda row: {**row, "messages": openai(row["messages"])},
    "sharegpt": lambda row: {**row, "messages": None, "conversations": sharegpt(row["messages"])},
    "answered": lambda row: {
        **row,
        "messages": [*row["messages"], {"from": "assistant", "content": "left out"}],
    },
}
REWRITINGS = [
    (type, name, write)
    for type, table in (("sft", SFT), ("preference", PREFERENCE), ("kto", KTO), ("prompt", PROMPT))
    for name, write in table.items()
]


@pytest.mark.parametrize(
    ("type", "name", "write"), REWRITINGS, ids=[f"{type} {name}" for type, name, _ in REWRITINGS]
)
def test_other_formats_give_the_same_rows(type, name, write, conversation):
    for file in SAMPLES[type]:
        rows = [row for row in sample(file) if "Target" not in row]
        if not rows:
            continue
        expected = tokenized(type, rows, conversation)
        assert (
            len(expected[0]) == len(rows)
            and tokenized(type, [write(row) for row in rows], conversation) == expected
        )


def test_single_rounds_as_alpaca_and_single_questions_as_plain_prompts(conversation):
    rows = [row for row in sample("sft") if one_round(row)]
    alpaca = [
        {"instruction": q["content"], "input": "", "output": a["content"]}
        for q, a in (r["messages"] for r in rows)
    ]
    assert len(rows) > 100 and tokenized("sft", alpaca, conversation) == tokenized(
        "sft", rows, conversation
    )
    rows = [row for row in sample("prompt") if len(row["messages"]) == 1]
    question = [row["messages"][0]["content"] for row in rows]
    answers = [{"gt_answer": row.get("gt_answer")} for row in rows]
    expected = tokenized("prompt", rows, conversation)
    assert len(rows) > 100 and sum(row.gt_answer is not None for row in expected[0]) >= 100
    for format in (
        [{"question": q, **a} for q, a in zip(question, answers, strict=True)],
        [{"instruction": q, "id": 1, **a} for q, a in zip(question, answers, strict=True)],
        [
            {"messages": {"role": "user", "content": q}, **a}
            for q, a in zip(question, answers, strict=True)
        ],
    ):
        assert tokenized("prompt", format, conversation) == expected


def write_files(folder: Path, rows: list[dict]) -> list[Path]:
    """The same rows as jsonl, a JSON array, both gzipped, parquet and a saved data set."""
    import datasets
    import pyarrow as pa
    from pyarrow import parquet

    lines = "".join(json.dumps(row) + "\n" for row in rows)
    array = json.dumps(rows, indent=1)
    for name, text in (("a.jsonl", lines), ("a.json", array)):
        (folder / name).write_text(text)
        with gzip.open(folder / f"{name}.gz", "wt") as file:
            file.write(text)
    parquet.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "saved"), num_shards=2)
    return [
        folder / name
        for name in ("a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz", "a.parquet", "saved")
    ]


@pytest.mark.parametrize("type", SAMPLES)
def test_other_kinds_of_files_give_the_same_rows(type, tmp_path, conversation):
    rows = sample(SAMPLES[type][0])
    expected = tokenized(type, rows, conversation)
    for path in write_files(tmp_path, rows):
        found = [decode(row) for file in find_files([path]) for _, row in read_rows(file)]
        assert tokenized(type, found, conversation) == expected, path


def test_tables_give_the_same_rows(tmp_path, conversation):
    rows = [row for row in sample("sft") if one_round(row)]
    expected = tokenized("sft", rows, conversation)
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with open(tmp_path / name, "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, delimiter=delimiter)
            table.writerow(["instruction", "input", "output"])
            table.writerows(
                [m["messages"][0]["content"], "", m["messages"][1]["content"]] for m in rows
            )
        found = [decode(row) for _, row in read_rows(tmp_path / name)]
        assert tokenized("sft", found, conversation) == expected


@pytest.mark.parametrize("type", SAMPLES)
def test_whole_preparations_of_two_formats_agree(type, tmp_path, conversation):
    rows = [row for row in sample(SAMPLES[type][0])[:40] if "Target" not in row]
    write = {"sft": SFT, "preference": PREFERENCE, "kto": KTO, "prompt": PROMPT}[type]
    tables = []
    for name, rewrite in (("own", None), *list(write.items())[:1]):
        lines = [json.dumps(rewrite(row) if rewrite else row) + "\n" for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
        report = prepare_dataset(
            inputs=[tmp_path / f"{name}.jsonl"],
            tokenizer=conversation.tokenizer,
            template=conversation,
            type=type,
            arrow_dir=tmp_path / name,
            num_bins=2,
            num_proc=1,
            max_length=4000,
            show=None,
        )
        assert report["rows_kept"] == 40
        tables.append(load_tokenized_dataset(str(tmp_path / name)).data.table)
    assert tables[0].equals(tables[1])


def test_plain_texts_are_learned_whole_and_end(conversation):
    made = tokenized("sft", sample("ptx"), conversation)[1]
    for columns, row in zip(made, sample("ptx"), strict=False):
        assert columns["input_ids"] == columns["labels"] and columns["labels_decode"] == [
            row["Target"] + "<|im_end|>"
        ]


def test_the_samples_of_other_formats_are_what_their_names_say():
    seen = {}
    for path in sorted((DATA / "shapes").iterdir()):
        type, _, format = path.stem.partition("_")
        format = {"trl_implicit": "trl", "trl_text": "trl"}.get(format, format)
        found = [read_row(type, decode(row)) for _, row in read_rows(path)]
        assert len(found) >= 3 and {row.format for row in found} == {format}, path
        seen.setdefault(type, set()).add(format)
    own = {
        "sft": {"messages", "alpaca", "source_target"},
        "preference": {"preference"},
        "kto": {"kto"},
    }
    expected = {
        "sft": {"openai", "message_list", "sharegpt", "trl"},
        "preference": {"hh_rlhf", "rm_static", "trl"},
        "kto": {"trl"},
        "prompt": {"rl_example", "plain"},
        "text": {"text", "document"},
    }
    assert seen == expected and own.keys() <= expected.keys()


def test_the_samples_are_small_and_share_no_text_between_training_and_evaluation():
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 2_000_000
    texts = []
    for name in SAMPLES["preference"]:
        messages = [
            m["content"]
            for row in sample(name)
            for key in ("context", "chosen", "rejected")
            for m in row[key]
        ]
        texts.append({" ".join(text.lower().split()) for text in messages})
    assert not texts[0] & texts[1] and len(sample("preference_eval")) == 140
    labels = [row["label"] for row in sample("kto")]
    assert 0.4 < sum(labels) / len(labels) < 0.6
