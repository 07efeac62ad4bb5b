"""Windows of a stream: the rows that a preparation makes of the same files, what is left out and
counted, what ends a run, and memory that does not grow with the file."""

import csv
import gzip
import json
import os
import tracemalloc
from collections import Counter
from itertools import islice

import pyarrow as pa
import pytest
from pyarrow import parquet

from coati.dataset.load.loader import load_tokenized_dataset
from coati.dataset.prepare import workers
from coati.dataset.prepare.preparation import prepare_dataset
from coati.dataset.stream import row_stream
from coati.utils.json_io import load_json
from tests.dataset.stream.streams import (
    batches,
    loader,
    stream,
    talk,
    template,
    write_files,
    write_lines,
)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(row_stream, "WINDOW", 40)


def epoch_of(found) -> list[dict]:
    """The training rows of the first epoch."""
    rows = []
    for window in found.windows():
        rows += [window.rows[int(entry)] for entry in window.entries]
        if window.next_epoch:
            return rows
    raise AssertionError


def ids_of(rows) -> Counter:
    return Counter((tuple(row["input_ids"]), tuple(row["labels"])) for row in rows)


def every_kind(folder):
    """A folder with a file of each kind that is read."""
    rows = [talk(f"row {number}", number % 3 + 1) for number in range(90)]
    write_lines(folder / "a.jsonl", rows[:20])
    (folder / "b.json").write_text(json.dumps(rows[20:40]))
    with gzip.open(folder / "c.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows[40:60])
    parquet.write_table(pa.Table.from_pylist(rows[60:90]), folder / "d.parquet")
    for name, mark in (("e.csv", ","), ("f.tsv", "\t")):
        with open(folder / name, "w", newline="") as file:
            table = csv.writer(file, delimiter=mark)
            table.writerow(["instruction", "output"])
            table.writerows((f"{name} {number}", f"says {number}") for number in range(10))
    return folder


@pytest.mark.parametrize("use", ["whole", "per_turn"])
@pytest.mark.parametrize("buffer, pack_length", [(0, None), (16, None), (16, 300)])
def test_an_epoch_has_the_rows_that_a_preparation_makes_of_every_kind_of_file(
    tmp_path, use, buffer, pack_length
):
    rows = every_kind(tmp_path / "rows")
    prepare_dataset(
        inputs=[rows],
        tokenizer=template(use).tokenizer,
        template=template(use),
        arrow_dir=tmp_path / "arrow",
        max_length=256,
        num_proc=1,
        show=None,
    )
    prepared = load_tokenized_dataset(str(tmp_path / "arrow"))
    found = stream(rows, buffer=buffer, pack_length=pack_length, use=use)
    made = []
    for window in found.windows():
        for entry in window.entries:
            made += [window.rows[int(row)] for row in (entry if pack_length else [entry])]
        if window.next_epoch:
            break
    assert len(made) > 90 and ids_of(made) == ids_of(prepared)
    if buffer == 0:
        assert [list(row["input_ids"]) for row in made] == prepared["input_ids"][:]


def test_packs_hold_at_most_their_length(tmp_path):
    found = stream(write_files(tmp_path, 100), pack_length=300)
    windows = list(islice(found.windows(), 3))
    packs = [
        [len(w.rows[int(i)]["input_ids"]) for i in pack] for w in windows for pack in w.entries
    ]
    assert max(map(sum, packs)) <= 300 and max(map(len, packs)) > 2


def test_a_window_of_long_rows_is_smaller(tmp_path, monkeypatch):
    monkeypatch.setattr(row_stream, "WINDOW_TOKENS", 2000)
    sizes = [len(w.rows) for w in islice(stream(write_files(tmp_path, 200)).windows(), 4)]
    assert sizes == [32] * 4  # one chunk of source rows is enough


def test_rows_of_like_length_come_together(tmp_path):
    found = stream(write_files(tmp_path, 300), buffer=300)
    lengths = [len(row["input_ids"]) for row in epoch_of(found)]
    spread = sum(max(lengths[i : i + 4]) - min(lengths[i : i + 4]) for i in range(0, 240, 4))
    alone = stream(write_files(tmp_path, 300), buffer=0)
    lengths = [len(row["input_ids"]) for row in epoch_of(alone)]
    assert 2 * spread < sum(
        max(lengths[i : i + 4]) - min(lengths[i : i + 4]) for i in range(0, 240, 4)
    )


BAD = (3, 40, 41, 99)


def test_what_cannot_be_used_is_counted_and_said_as_a_preparation_would(tmp_path, caplog):
    rows = write_files(tmp_path / "rows", 50, 50, bad=BAD)
    write_lines(tmp_path / "rows" / "long.jsonl", [talk("word " * 400)])
    prepare_dataset(
        inputs=[rows],
        tokenizer=template().tokenizer,
        template=template(),
        arrow_dir=tmp_path / "arrow",
        max_length=256,
        num_proc=1,
        show=None,
        max_bad_ratio=1.0,
    )
    report = load_json(tmp_path / "arrow" / "report.json")
    caplog.clear()
    found = stream(rows)
    next(window for window in found.windows() if window.epoch == 1)
    text = caplog.text
    assert (
        "epoch 0 of the stream is read: rows read 101, kept 96, dropped 5; training rows 96" in text
    )
    for reason, entry in report["dropped"].items():
        assert f"dropped {entry['rows']}: {reason} ({entry['meaning']})" in text
        assert text.count(f"first row that is left out for {reason}") == 1
    assert f"{rows / 'part-0.jsonl'}:4" in text


def test_epochs_of_the_same_counts_are_said_once_and_an_unfinished_one_at_the_end(tmp_path, caplog):
    found = stream(write_files(tmp_path, 10))
    list(islice(found.windows(), 5))
    found.finish()
    assert caplog.text.count("of the stream is read") == 1 and "read so far" not in caplog.text
    caplog.clear()
    found = stream(write_files(tmp_path, 200))
    next(found.windows())
    found.finish()
    assert "read so far, some of it ahead of the training: rows read 64, kept 64" in caplog.text


def test_too_many_malformed_rows_end_the_run_and_few_do_not(tmp_path):
    rows = write_files(tmp_path, 60, bad=BAD[:3])
    with pytest.raises(ValueError, match=r"3 of the first 60 rows are malformed(.|\n)*bad_json"):
        epoch_of(stream(rows, bad_ratio=0.04))
    assert len(epoch_of(stream(rows, bad_ratio=0.05))) == 57


def test_in_a_long_file_they_end_it_long_before_its_end(tmp_path):
    rows = write_files(tmp_path, 4000, bad=range(0, 400, 4))
    with pytest.raises(ValueError, match=r"1[1-9] of the first \d\d rows are malformed"):
        epoch_of(stream(rows, buffer=0, bad_ratio=0.01))


def test_an_epoch_without_a_row_to_train_on_ends_the_run(tmp_path):
    rows = write_lines(tmp_path / "a.jsonl", ["{", "{"])
    with pytest.raises(
        ValueError, match="nothing left: none of the 2 rows of --dataset, from .*a.js"
    ):
        stream(rows).peek()


def test_a_file_that_changes_while_it_is_read_ends_the_run_by_name(tmp_path):
    rows = write_files(tmp_path, 60, 60)
    found = stream(rows)
    windows = found.windows()
    next(windows)
    with open(rows / "part-1.jsonl", "a") as file:
        file.write(json.dumps(talk("more")) + "\n")
    with pytest.raises(ValueError, match=r"part-1.jsonl: was changed while it was read"):
        list(islice(windows, 20))


def places(found, count: int) -> list[str]:
    return [
        window.places[int(entry)]
        for window in islice(found.windows(), count)
        for entry in window.entries
    ]


def test_processes_that_work_ahead_give_the_same_windows(tmp_path):
    rows = write_files(tmp_path, 150, 20)
    found = stream(rows, num_proc=2)
    assert places(found, 8) == places(stream(rows), 8)
    found.close()


def test_errors_of_the_reading_thread_come_out_where_rows_are_asked_for(tmp_path):
    found = stream(write_lines(tmp_path / "a.jsonl", ["{"] * 5), num_proc=1)
    for _ in range(2):
        with pytest.raises(ValueError, match="nothing left"):
            found.peek()
    found.close()


def test_a_worker_that_dies_ends_the_run_with_advice(tmp_path, monkeypatch):
    monkeypatch.setattr(row_stream.StreamWorker, "run", lambda *_: os._exit(3))
    found = stream(write_files(tmp_path, 10), num_proc=1)
    with pytest.raises(OSError, match="use fewer with --stream_workers"):
        found.peek()
    found.close()


def test_workers_outlive_a_signal_to_all_processes_of_the_job(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "GRACE_S", 20.0)
    found = stream(write_files(tmp_path, 1200), num_proc=1)
    windows = found.windows()
    next(windows)
    for process in found._pool._pool._processes.values():
        process.terminate()
    assert sum(len(window.rows) for window in islice(windows, 20)) >= 20 * 40
    found.close()


@pytest.mark.parametrize("type", ["preference", "kto"])
def test_rows_of_other_types(tmp_path, type):
    asked = [{"role": "user", "content": "hi"}]
    rows = {
        "preference": [
            {
                "prompt": asked,
                "chosen": [{"role": "assistant", "content": f"good {number}"}],
                "rejected": [{"role": "assistant", "content": "bad"}],
            }
            for number in range(9)
        ],
        "kto": [
            {"prompt": asked, "completion": f"so {number}", "label": number % 2 == 0}
            for number in range(9)
        ],
    }[type]
    found = stream(write_lines(tmp_path / "a.jsonl", rows), type=type, buffer=0)
    made = [row for batch in batches(loader(found), 2) for row in batch]
    assert len(made) == 8 and all(isinstance(row["seq_length"], int) for row in made)
    if type == "kto":
        assert [row["label"] for row in made] == [True, False] * 4
        assert isinstance(made[0]["completion"], list)
    else:
        assert made[0]["margin"] is None and sum(made[0]["chosen_loss_mask"]) > 2


def peak_of(path, count: int) -> int:
    """Bytes of Python objects at most while ``count`` windows are made."""
    found = stream(path, buffer=64)
    windows = found.windows()
    next(windows)  # what is imported and compiled once
    tracemalloc.start()
    for _ in range(count):
        next(windows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_file(tmp_path):
    # Few words: the tokenizer's memory of words grows to a bound of its own.
    rows = [talk(f"row {number}", number % 3 + 1) for number in range(60)]
    few = peak_of(write_lines(tmp_path / "few.jsonl", rows * 10), 12)
    many = peak_of(write_lines(tmp_path / "many.jsonl", rows * 60), 80)
    assert many < 1.2 * few and (tmp_path / "many.jsonl").stat().st_size > 2 * many
