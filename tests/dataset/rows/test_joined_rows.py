"""Rows that are parts of one, put together in any order: single messages of trees, and rated
responses to one prompt."""

import csv
import gzip
import json
import random
import tracemalloc
from pathlib import Path

import pytest

from coati.dataset.prepare.shard_plan import Files, count_rows
from coati.dataset.rows.column_names import Layout
from coati.dataset.rows.formats import read_row
from coati.dataset.rows.input_files import find_sources, raw_rows, read_as
from coati.dataset.rows.joined_rows import DEEPEST, joined, whole_rows
from coati.dataset.rows.readers import decode
from coati.dataset.rows.row_errors import RowError
from coati.dataset.stream.row_sources import FileSource, HubSource
from coati.recipes.mixed_rows import type_of_path
from tests.dataset.rows.test_format_files import talk


def message(id, parent, text, role="assistant", **more) -> dict:
    return {"message_id": id, "parent_id": parent, "text": text, "role": role, **more}


def tree(name: str) -> list[dict]:
    """A prompt with two replies, the better of which is answered."""
    return [
        message(name, None, f"Prompt {name}", "prompter"),
        message(f"{name}1", name, "good", rank=0),
        message(f"{name}2", name, "bad", rank=1),
        message(f"{name}3", f"{name}1", "more", "prompter"),
        message(f"{name}4", f"{name}3", "much more", rank=0),
    ]


def rated(prompt, response, helpfulness, **more) -> dict:
    return {"prompt": prompt, "response": response, "helpfulness": helpfulness, **more}


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with open(path, "w", encoding="utf-8", newline="") as file:
            names = list(dict.fromkeys(name for row in rows for name in row))
            table = csv.DictWriter(file, names)
            table.writeheader()
            table.writerows(rows)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def read(type: str, path: Path, layout: Layout | None = None) -> list:
    """Each row of the file as data of ``type``, or why it is none."""
    found = []
    for _, raw in whole_rows(path, layout=layout):
        try:
            found.append(read_row(type, decode(raw), layout=layout))
        except RowError as error:
            found.append(error)
    return found


def conversations(row) -> list[list[str]]:
    """The texts of the row and of its branches."""
    return sorted([m["content"] for m in one.messages] for one in (row, *row.branches))


def said(row) -> tuple:
    return tuple(m["content"] for turns in (row.messages, row.chosen, row.rejected) for m in turns)


ROWS = [row for name in "pqr" for row in tree(name)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "parquet"])
def test_trees_are_the_same_in_any_order(tmp_path, kind, seed):
    rows = random.Random(seed).sample(ROWS, len(ROWS)) if seed else ROWS
    # A column of the first row alone: parquet then has nulls in the others.
    path = write(tmp_path / f"a.{kind}", [row | {"rank": row.get("rank")} for row in rows])
    found = read("sft", path)
    first = list(dict.fromkeys(row["message_id"][0] for row in rows))
    assert [conversations(row)[0][0] for row in found] == [f"Prompt {name}" for name in first]
    for row, name in zip(found, first, strict=True):
        asked = f"Prompt {name}"
        assert conversations(row) == [[asked, "bad"], [asked, "good", "more", "much more"]]
    pairs = [said(row) for row in read("preference", path)]
    assert pairs == [(f"Prompt {name}", "good", "bad") for name in first]
    assert count_rows(path) == len(Files([path]).counts) * 3 == 3
    assert [line for line, _ in whole_rows(path)] == [
        next(
            k
            for k, row in enumerate(rows, 2 if kind == "csv" else 1)
            if row["message_id"][0] == name
        )
        for name in first
    ]


def test_ids_ranks_and_switches_may_be_text_or_numbers(tmp_path):
    rows = [
        message(1, "", "Prompt", "prompter", rank="", deleted="False", review_result="True"),
        message("2", 1, "bad", rank="1.0", deleted="False", review_result=""),
        message(3, "1", "good", rank=0.0, deleted=0, review_result=True),
        message(4, 1.0, "lost", rank=7),
        message(5, 1, "spam", rank="9", deleted="True"),
        message(6, 1, "worse", rank="8", review_result="False"),
    ]
    (found, lost) = read("preference", write(tmp_path / "a.jsonl", rows))
    assert said(found) == ("Prompt", "good", "bad")
    assert found.unused["turned down by reviewers"] is False
    assert (
        lost.reason == "bad_tree" and "the parent_id 1.0 of the message 4 is in no" in lost.detail
    )


def test_what_makes_no_tree_is_named(tmp_path):
    rows = [
        message("a", "nobody", "lost", rank=0),
        message("b", "a", "lost too", "prompter"),
        *tree("p"),
        message("p1", "p", "again", rank=2),
        message("x", "z", "round"),
        message("y", "x", "and round", "prompter"),
        message("z", "y", "it goes"),
        message("s", "s", "alone"),
        message("d", None, "deleted", "prompter", deleted=True),
        message("e", "d", "reply", rank=0),
    ]
    for seed in range(5):
        mixed = random.Random(seed).sample(rows, len(rows))
        found = read("preference", write(tmp_path / "a.jsonl", mixed))
        errors = [f"{one.reason}: {one.detail}" for one in found if isinstance(one, RowError)]
        kept = [said(one) for one in found if not isinstance(one, RowError)]
        assert [one[0] for one in kept] == ["Prompt p"] and len(errors) == 4
        for text in (
            "bad_tree: the parent_id nobody of the message a is in no other row: 2 messages",
            "bad_tree: the message_id p1 stands in two rows",
            "leads back to it: 4 messages have no beginning",
            "judged_bad: the prompt was turned down by reviewers",
        ):
            assert any(text in error for error in errors), (text, errors)


def test_trees_without_ranked_replies_are_no_pairs_but_conversations(tmp_path):
    rows = [message("p", None, "Prompt", "prompter"), message("a", "p", "Reply", rank=0)]
    path = write(tmp_path / "a.jsonl", rows)
    (error,) = read("preference", path)
    assert error.reason == "no_preference"
    assert conversations(read("sft", path)[0]) == [["Prompt", "Reply"]]


def test_a_conversation_without_end_is_refused(tmp_path):
    def chain(length: int) -> list[dict]:
        roles = ("prompter", "assistant")
        names = [str(k) for k in range(length)]
        parents = [None, *names[:-1]]
        return [
            message(name, parent, f"turn {name}", roles[k % 2])
            for k, (name, parent) in enumerate(zip(names, parents, strict=True))
        ]

    path = write(tmp_path / "a.jsonl", chain(DEEPEST))
    assert len(read("sft", path)[0].messages) == DEEPEST
    path = write(tmp_path / "b.jsonl", chain(5000)[::-1])
    (error,) = read("sft", path)
    assert error.detail == f"a conversation of more than {DEEPEST} messages"


RATED = [
    rated("a", "bad", 1, verbosity=0),
    rated("b", "tie one", 3),
    rated("a", "good", 4, verbosity=2),
    rated("c", "alone", 2.0),
    rated("b", "tie two", "3"),
    rated("a", "between", 2, verbosity=2),
    rated("d", "useless", 0),
    rated("d", "hardly better", 1),
]


def test_ratings_become_pairs(tmp_path):
    pair, tie, alone, low = read("preference", write(tmp_path / "a.jsonl", RATED))
    assert said(pair) == ("a", "good", "bad")
    assert pair.unused == {"response between the best and the worst": False, "verbosity": False}
    assert (tie.reason, tie.detail) == ("no_preference", "all 2 responses have helpfulness 3")
    assert (alone.reason, alone.detail) == ("no_preference", "one response alone")
    assert said(low) == ("d", "hardly better", "useless")


@pytest.mark.parametrize("seed", range(4))
def test_pairs_are_the_same_in_any_order(tmp_path, seed):
    rows = random.Random(seed).sample(RATED, len(RATED))
    found = read("preference", write(tmp_path / "a.jsonl", rows))
    pairs = {said(row) for row in found if not isinstance(row, RowError)}
    assert pairs == {("a", "good", "bad"), ("d", "hardly better", "useless")}


def test_the_best_response_is_learned_and_never_a_bad_one(tmp_path):
    path = write(tmp_path / "a.jsonl", RATED)
    best, tie, alone, bad = read("sft", path)
    assert (said(best), said(tie), said(alone)) == (("a", "good"), ("b", "tie one"), ("c", "alone"))
    assert (bad.reason, bad.detail) == (
        "judged_bad",
        "helpfulness is 1, of at most 4 (the best of 2 responses); if it judges no response: "
        "--columns helpfulness=",
    )
    assert [said(row) for row in read("prompt", path)] == [("a",), ("b",), ("c",), ("d",)]
    for error in read("kto", path):
        assert error.reason == "wrong_type"
        assert "a rating is no label: add a column label" in error.detail
    # Following the advice: every row is then a conversation of its own, whatever its rating.
    found = read("sft", path, Layout({"helpfulness": ""}))
    assert [said(row) for row in found] == [(row["prompt"], row["response"]) for row in RATED]
    labeled = write(
        tmp_path / "b.jsonl", [row | {"label": row["response"] != "bad"} for row in RATED]
    )
    assert [row.label for row in read("kto", labeled)] == [False] + [True] * 7


def test_a_bad_response_that_was_not_put_together_is_not_learned_either():
    with pytest.raises(RowError, match="helpfulness is 1, of at most 4; if") as error:
        read_row("sft", rated("a", "bad", 1))
    assert error.value.reason == "judged_bad"
    assert said(read_row("sft", rated("a", "good", 2))) == ("a", "good")
    assert said(read_row("sft", rated("a", "other scale", 0.5))) == ("a", "other scale")


def test_the_same_words_under_another_system_message_are_another_prompt(tmp_path):
    rows = [
        rated("a", "x", 4, system="s"),
        rated("a", "y", 1, system="t"),
        rated("a", "z", 2, system="s"),
    ]
    first, second = read("preference", write(tmp_path / "a.jsonl", rows))
    assert said(first) == ("s", "a", "x", "z") and second.reason == "no_preference"


def test_other_rows_of_the_file_stay_as_they_are(tmp_path):
    path = tmp_path / "a.jsonl"
    other = {"prompt": "other", "response": "row"}
    lines = [json.dumps(row) for row in (RATED[0], other, RATED[2])]
    path.write_text("\n".join([*lines[:2], "no json", *lines[2:]]))
    assert [line for line, _ in whole_rows(path)] == [1, 2, 3]
    best, plain, broken = read("sft", path)
    assert (said(best), said(plain)) == (("a", "good"), ("other", "row"))
    assert broken.reason == "bad_json"


def test_rows_whose_columns_are_named_are_rows_by_themselves(tmp_path):
    path = write(tmp_path / "a.jsonl", RATED)
    layout = Layout({"prompt": "prompt", "response": "response"})
    assert len(read("sft", path, layout)) == len(RATED)
    (source,) = find_sources([path], layout=layout)
    assert len(list(raw_rows([source]))) == Files([source]).total == len(RATED)
    (source,) = find_sources([path])
    assert len(list(raw_rows([source]))) == Files([source]).total == 4
    assert read_as(source) == {"joins": ["helpfulness", "prompt", "response"]}
    (source,) = find_sources([write(tmp_path / "b.jsonl", [{"prompt": "a", "response": "b"}])])
    assert read_as(source) == {}


def test_documents_are_not_put_together(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    assert len(list(whole_rows(path, "file"))) == count_rows(path, "file") == len(ROWS)
    # Beside texts they are conversations.
    assert type_of_path(str(path), "text") == "sft"


def test_streams_read_them_too(tmp_path):
    path = write(tmp_path / "a.jsonl", RATED)
    source = FileSource(path, rows=3)
    assert [line for line, _ in source.rows()] == [1, 2, 4] == [line for line, _ in source.rows()]
    hub = HubSource(RATED, "owner/name", "commit", None)
    assert [line for line, _ in hub.rows()] == [1, 2, 4, 7]
    few = HubSource(RATED, "owner/name", "commit", None, limit=2)
    assert [len(row["responses"]) for _, row in few.rows()] == [3, 2]


def test_memory_does_not_grow_with_what_the_rows_hold():
    def rows(words: str):
        for number in range(4000):
            yield number + 1, rated(f"prompt {number % 2000}", words, number % 5)

    def peak(words: str) -> int:
        tracemalloc.start()
        assert sum(1 for _ in joined(rows(words))) == 2000
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak("long " * 2000) < peak("short") + 1_000_000  # of 40 MB of text


def test_the_turns_that_a_prompt_marks_are_turns(tmp_path):
    prompt = "Name a river.\n\n<extra_id_1>Assistant\nThe Rhine.\n\n<extra_id_1>User\nA short one."
    asked = talk("Name a river.", "The Rhine.", "A short one.")
    voted = {
        "prompt": prompt,
        "response_1": "The Pader.",
        "response_2": "No.",
        "preference_strength": -2,
    }
    rows = [rated(prompt, "The Pader.", 4), rated(prompt, "No.", 0)]
    found = [read_row("preference", voted), *read("preference", write(tmp_path / "a.jsonl", rows))]
    for row in found:
        assert row.messages == asked and said(row)[3:] == ("The Pader.", "No.")
    assert read_row("prompt", {"prompt": prompt}).messages == asked
    odd = "What does <extra_id_1> mean in T5?"
    assert read_row("prompt", {"prompt": odd}).messages == talk(odd)
