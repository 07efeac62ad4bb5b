"""Rows to shards: files before the first wanted row stay closed, no chunk crosses a border, the
share is the share."""

import json

import pytest

from coati.dataset.prepare import shard_plan as plan
from coati.dataset.prepare.shard_plan import (
    Bin,
    EvaluationShare,
    Files,
    Selection,
    count_rows,
    plan_bins,
    tasks,
)
from coati.dataset.rows.row_errors import RowError


@pytest.fixture
def files(tmp_path):
    """Three files of 3, 0 and 5 rows: a.jsonl, b.json, c.parquet."""
    import pyarrow as pa
    from pyarrow import parquet

    (tmp_path / "a.jsonl").write_text("0\n\n1\n2\n")
    (tmp_path / "b.json").write_text("[]")
    parquet.write_table(pa.table({"n": [3, 4, 5, 6, 7]}), tmp_path / "c.parquet")
    return [tmp_path / name for name in ("a.jsonl", "b.json", "c.parquet")]


def number(raw) -> int:
    return raw["n"] if isinstance(raw, dict) else json.loads(raw)


def test_rows_are_counted_and_numbered_through_all_files(files):
    found = Files(files, first=7)
    assert found.counts == [3, 0, 5] and found.total == 8
    assert [(file, line, number(raw)) for file, line, raw in found.rows(2)] == [
        (7, 4, 2),
        *[(9, line, line + 2) for line in range(1, 6)],
    ]


def test_files_before_the_start_are_not_opened(files, monkeypatch):
    found, opened, read = Files(files), [], plan.whole_rows
    monkeypatch.setattr(
        plan, "whole_rows", lambda path, *how: opened.append(path.name) or read(path, *how)
    )
    assert [number(raw) for _, _, raw in found.rows(4)] == [4, 5, 6, 7] and opened == ["c.parquet"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.csv", "a.txt"])
def test_counting_agrees_with_reading(name, tmp_path):
    import gzip

    text = {
        "a.json": '[{"a": "],[{"}, [1, [2]],\n3]',
        "a.csv": 'x,y\n1,"2\n3"\n4,5\n6,7\n',
        "a.txt": "a\nb\n\nc\n",
    }
    data = text.get(name, "1\n\n2\n3").encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert count_rows(tmp_path / name) == 3


def shown(files: Files, bins: list[Bin], selection: Selection) -> list:
    return [
        (t.bin.number, t.shard, t.rows and [number(raw) for _, _, raw in t.rows])
        for t in tasks(files, bins, selection)
    ]


def test_chunks_end_with_their_bin_and_finished_bins_are_left_out(files, monkeypatch):
    monkeypatch.setattr(plan, "CHUNK_ROWS", 2)
    found, every = Files(files), Selection(-1, 0)
    bins = plan_bins(8, 3)
    assert shown(found, bins, every) == [
        (0, "part-00000", [0, 1]),
        (0, "part-00000", [2]),
        (0, "", None),
        (1, "part-00001", [3, 4]),
        (1, "", None),
        (2, "part-00002", [5, 6]),
        (2, "part-00002", [7]),
        (2, "", None),
    ]
    assert shown(found, [bins[0], bins[2]], every) == [
        one for one in shown(found, bins, every) if one[0] != 1
    ]
    assert shown(found, [bins[1]], every) == [(1, "part-00001", [3, 4]), (1, "", None)]


def test_refused_rows_are_counted_within_their_shard(files):
    refused = {("part-00000", 1), ("eval/part-00001", 0)}
    error = RowError("duplicate", "of another")
    selection = Selection(
        -1,
        3,
        EvaluationShare(0.5, 8, 3),
        lambda shard, row: error if (shard, row) in refused else None,
    )
    found = {}
    for task in tasks(Files(files), plan_bins(8, 2, split=True), selection):
        for row, (_, _, raw) in enumerate(task.rows or []):
            found[task.shard, row] = raw
    assert {place for place, raw in found.items() if raw is error} == refused and len(found) == 8


def test_of_very_many_rows_each_is_drawn_with_the_probability_of_the_share(monkeypatch):
    monkeypatch.setattr(plan, "EXACT_ROWS", 0)
    for seed in range(5):
        chosen = EvaluationShare(0.1, 100_000, seed).chosen(0, 100_000)
        assert 9_700 < chosen.sum() < 10_300
        assert (
            700 < (chosen[1:] & chosen[:-1]).sum() < 1_300
        )  # neighbors know nothing of each other
