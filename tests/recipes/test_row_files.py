"""Rows of a Python caller as files: each form that data may have, and what is refused."""

import json
import os
from pathlib import Path

import datasets
import pytest

from coati.recipes.row_files import json_file, paths_of

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hé"}]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return tmp_path / "coati" / "rows"


def rows_in(path: str) -> list:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_rows_are_one_file_named_by_what_they_hold(cache):
    rows = [{"messages": TALK}, TALK]
    (first,) = paths_of(rows, "dataset")
    assert rows_in(first) == rows and Path(first).parent == cache
    os.utime(first, ns=(7, 7))
    assert paths_of((row for row in rows), "dataset") == [first]
    assert os.stat(first).st_mtime_ns == 7  # what was prepared of it is still found
    (second,) = paths_of(rows[:1], "dataset")
    assert sorted(cache.iterdir()) == sorted([Path(first), Path(second)])


def test_the_first_rank_of_a_machine_writes_and_the_others_read_their_rows_alone(
    cache, monkeypatch
):
    monkeypatch.setenv("LOCAL_RANK", "1")
    (other,) = paths_of([TALK], "dataset")
    assert not cache.exists()
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert paths_of([TALK], "dataset") == [other] and rows_in(other) == [TALK]


def test_data_sets_of_hugging_face_and_paths():
    rows = [{"prompt": "a", "gt_answer": "1"}, {"prompt": "b", "gt_answer": None}]
    held = datasets.Dataset.from_list(rows)
    (file,) = paths_of(held, "prompt_dataset")
    assert rows_in(file) == rows
    assert paths_of("a.jsonl", "dataset") == paths_of(Path("a.jsonl"), "dataset") == ["a.jsonl"]
    assert paths_of(["a.jsonl", held, Path("b")], "dataset") == ["a.jsonl", file, "b"]


@pytest.mark.parametrize(
    "data, said",
    [
        ({"messages": TALK}, "dataset is one dict"),
        (datasets.DatasetDict(), "dataset is a dict of splits"),
        (3, "dataset is int"),
        ([], "dataset holds no rows"),
        (TALK, "dataset is a single conversation"),
        ([{"messages": TALK}, 4], "dataset[1] is int"),
        ([{"prompt": "a"}, "b"], "dataset[1] is str"),
        ([{"prompt": "a"}, {"prompt": {1, 2}}], "dataset[1] cannot be written as JSON"),
    ],
)
def test_what_is_no_data_is_refused(cache, data, said):
    with pytest.raises((TypeError, ValueError)) as error:
        paths_of(data, "dataset")
    assert said in str(error.value)
    assert not cache.exists() or not list(cache.iterdir())


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="rows cannot be written there"):
        paths_of([TALK], "dataset")


def test_settings_given_as_a_dict():
    file = json_file({"r": 4})
    assert json.loads(Path(file).read_text()) == {"r": 4} and file.endswith(".json")
