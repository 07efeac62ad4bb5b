"""An interrupted preparation is completed, a finished one is recognized, and the result is the same
to the byte."""

import json
import os
import pickle
import signal
import sys
import time
import types
from pathlib import Path

import pytest

from coati.dataset import load_tokenized_dataset
from coati.dataset.prepare import staging
from coati.dataset.prepare.dedup_pass import HashStore
from coati.dataset.prepare.shards import ShardWriter
from coati.dataset.prepare.write_pass import TokenizeWorker
from coati.dataset.report.row_stats import RowStats, SampledRow
from tests.dataset.prepare.test_prepare import row, run, write

ROWS = [row(f"question {i}", f"answer {i} " * (1 + i % 5)) for i in range(200)] + ["{", row("q")]
CLEANING = {"deduplicate": True, "drop_eval_overlap": True}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def prepare(folder: Path, data: Path, **settings) -> dict:
    from coati.dataset.clean.cleaning import Cleaning

    return run(
        folder,
        data,
        **{"num_bins": 6, "eval_ratio": 0.1, "cleaning": Cleaning(**CLEANING), **settings},
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The input, and the files of a preparation that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    data = write(folder / "rows.jsonl", *ROWS)
    prepare(folder, data)
    return data, contents(folder / "arrow"), contents(folder / "jsonl")


def end_at(owner, name: str, call: int, folder: Path, data: Path) -> None:
    """Prepare in another process, which is gone at once when it comes to the n-th call of a
    function."""
    original = getattr(owner, name)
    calls = []

    def counted(*args, **keywords):
        calls.append(1)
        if len(calls) == call:
            os._exit(9)
        return original(*args, **keywords)

    child = os.fork()
    if child == 0:
        try:
            setattr(owner, name, counted)
            prepare(folder, data)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


POINTS = [
    (HashStore, "save", 2),
    (ShardWriter, "add", 1),
    (ShardWriter, "add", 7),
    (ShardWriter, "close", 1),
    (ShardWriter, "close", 4),
    (ShardWriter, "close", 12),
    (staging.StagingDir, "store", 2),
    (staging.os, "replace", 3),
    (staging.os, "rename", 3),
    (staging.os, "rename", 13),
    (staging.os, "rename", 14),
    (TokenizeWorker, "run", 9),
    (staging.StagingDir, "_rename", 1),
    (staging.StagingDir, "_remove", 1),
]


@pytest.mark.parametrize(
    ("owner", "name", "call"), POINTS, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_whatever_moment_it_ends_at_the_same_call_completes_it(owner, name, call, whole, tmp_path):
    data, arrow, jsonl = whole
    end_at(owner, name, call, tmp_path, data)
    report = prepare(tmp_path, data)
    assert contents(tmp_path / "arrow") == arrow and contents(tmp_path / "jsonl") == jsonl
    assert sorted(path.name for path in tmp_path.iterdir()) == ["arrow", "jsonl"]
    assert report["rows_read"] + report["evaluation"]["rows_read"] == len(ROWS)


def test_what_is_finished_is_not_done_again(whole, tmp_path, monkeypatch, capsys):
    data, arrow, _ = whole
    end_at(staging.StagingDir, "store", 5, tmp_path, data)
    read = []
    original = TokenizeWorker.run
    monkeypatch.setattr(
        TokenizeWorker,
        "run",
        lambda job, chunk, *rest: read.append(len(chunk)) or original(job, chunk, *rest),
    )
    prepare(tmp_path, data)
    # The last two of six parts of 202 rows; nothing is compared again either.
    assert sum(read) == 202 - round(202 * 4 / 6) and contents(tmp_path / "arrow") == arrow
    assert "4 of 6 parts are done already" in capsys.readouterr().err


def test_a_finished_preparation_is_recognized(tmp_path, monkeypatch, capsys):
    data = write(tmp_path / "a.jsonl", row("q", "a"), row("q", "b"))
    said = []
    first = run(tmp_path, data, show=said.append)
    monkeypatch.setattr(TokenizeWorker, "run", None)
    monkeypatch.setattr("coati.dataset.prepare.preparation.Files", None)
    before = contents(tmp_path)
    assert run(tmp_path, data, num_proc=2, show=said.append) == first and said[0] == said[1]
    assert "arrow is prepared already" in capsys.readouterr().err and contents(tmp_path) == before


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_length": 64}, "max_length was 4096, now 64"),
        ({"seed": 7}, "seed was 42, now 7"),
        ({"eval_ratio": 0.5}, "eval_ratio was 0.0, now 0.5"),
    ],
)
def test_an_output_made_otherwise_is_refused_with_what_differs(settings, said, tmp_path):
    data = write(tmp_path / "a.jsonl", row("q", "a"), row("q", "b"))
    run(tmp_path, data)
    before = contents(tmp_path)
    with pytest.raises(
        ValueError, match=f"exists already, made from something else: {said}; name another"
    ):
        run(tmp_path, data, **settings)
    assert contents(tmp_path) == before


def test_a_changed_input_a_new_one_and_a_changed_template_are_named(tmp_path):
    data = write(tmp_path / "a.jsonl", row("q", "a"))
    run(tmp_path, data)
    other = write(tmp_path / "b.jsonl", row("q", "b"))
    with pytest.raises(ValueError, match=f"inputs: new {other};"):
        run(tmp_path, data, other)
    write(data, row("q", "other"))
    with pytest.raises(ValueError, match=f"inputs: changed {data};"):
        run(tmp_path, data)
    (tmp_path / "jsonl" / "report.json").unlink()
    write(data, row("q", "a"))
    os.utime(
        data,
        ns=(0, json.loads((tmp_path / "arrow" / "made_from.json").read_text())["inputs"][0][2]),
    )
    run(tmp_path, data)  # nothing but the file's time says that it was written again
    (tmp_path / "jsonl").rename(tmp_path / "elsewhere")
    with pytest.raises(
        ValueError, match="arrow exists already, but .*jsonl, which belongs to it, does not"
    ):
        run(tmp_path, data)


def test_an_interrupted_one_of_other_settings_is_named_and_left_alone(whole, tmp_path, capsys):
    data, arrow, _ = whole
    end_at(staging.StagingDir, "store", 3, tmp_path, data)
    prepare(tmp_path, data, max_length=512)
    assert (
        "holds an interrupted preparation (max_length was 4096, now 512)" in capsys.readouterr().err
    )
    assert len(list(tmp_path.glob(".arrow.*.tmp"))) == 1


def test_a_row_too_bad_removes_what_was_begun(tmp_path):
    data = write(tmp_path / "a.jsonl", *[row("q", str(i)) for i in range(300)], "{")
    with pytest.raises(ValueError, match="strict"):
        run(tmp_path, data, num_bins=3, strict=True)
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["a.jsonl"]
    run(tmp_path, data, num_bins=3)
    with pytest.raises(ValueError, match="strict"):
        run(tmp_path, data, num_bins=3, strict=True)  # recognized, and still not good enough


def test_a_full_disk_keeps_what_is_finished(whole, tmp_path, monkeypatch, capsys):
    data, arrow, _ = whole
    original = staging.StagingDir.store
    calls = []

    def full(*args):
        calls.append(1)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(staging.StagingDir, "store", full)
        with pytest.raises(OSError, match="No space left"):
            prepare(tmp_path, data)
    assert (
        "the same command completes it" in capsys.readouterr().err
        and not (tmp_path / "arrow").exists()
    )
    prepare(tmp_path, data)
    assert contents(tmp_path / "arrow") == arrow


def test_an_input_that_changes_while_it_is_read_ends_the_job(tmp_path, monkeypatch):
    data = write(tmp_path / "a.jsonl", row("q", "a"), row("q", "b"))
    original = staging.StagingDir.store

    def meanwhile(*args):
        original(*args)
        write(data, row("q", "longer than before"))

    monkeypatch.setattr(staging.StagingDir, "store", meanwhile)
    with pytest.raises(ValueError, match=f"changed while it was read .inputs: changed {data}"):
        run(tmp_path, data)
    assert not (tmp_path / "arrow").exists()


def in_another_process(folder: Path, data: Path, pause: float) -> int:
    """The id of a process that prepares, with two workers, at leisure."""
    original = TokenizeWorker.run
    child = os.fork()
    if child == 0:
        status = 1
        try:
            TokenizeWorker.run = lambda *given: (time.sleep(pause), original(*given))[1]
            prepare(folder, data, num_proc=2)
            status = 0
        finally:
            os._exit(status)
    return child


def test_killed_with_its_workers_at_work(whole, tmp_path):
    data, arrow, jsonl = whole
    child = in_another_process(tmp_path, data, pause=0.2)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".arrow.*.tmp/counts/part-00001")) and time.monotonic() < deadline:
        time.sleep(0.02)
    workers_of = Path(f"/proc/{child}/task/{child}/children").read_text().split()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(workers_of) >= 2 and not (tmp_path / "arrow").exists()
    while any(_alive(pid) for pid in workers_of) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(_alive(pid) for pid in workers_of)
    report = prepare(tmp_path, data)
    assert contents(tmp_path / "arrow") == arrow and contents(tmp_path / "jsonl") == jsonl
    assert (
        len(load_tokenized_dataset(str(tmp_path / "arrow" / "eval")))
        == report["evaluation"]["rows_written"]
    )


def _alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] not in "ZX"
    except OSError:
        return False


def test_two_at_once_do_the_work_once(whole, tmp_path, capfd):
    data, arrow, _ = whole
    both = [in_another_process(tmp_path, data, pause=0.02) for _ in range(2)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in both] == [0, 0]
    said = capfd.readouterr().err
    assert ("waiting for it" in said) != ("prepared already" in said) and contents(
        tmp_path / "arrow"
    ) == arrow


def pickled_by_an_older_version(counts, monkeypatch) -> bytes:
    """As when the classes of statistics were Tally and Shown of coati.dataset.tally."""
    module = types.ModuleType("coati.dataset.tally")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    classes = {RowStats: "Tally", SampledRow: "Shown"}
    names = {one: (one.__module__, one.__qualname__) for one in classes}
    try:
        for one, old in classes.items():
            setattr(module, old, one)
            one.__module__ = module.__name__
            one.__qualname__ = old
        return pickle.dumps(counts)
    finally:
        for one, before in names.items():
            one.__module__, one.__qualname__ = before


def test_finished_parts_of_an_older_version_are_taken(whole, tmp_path, capsys, monkeypatch):
    data, arrow, _ = whole
    end_at(staging.StagingDir, "store", 5, tmp_path, data)
    counts = sorted(tmp_path.glob(".arrow.*.tmp/counts/part-*"))
    for path in counts:
        old = pickled_by_an_older_version(pickle.loads(path.read_bytes()), monkeypatch)
        assert b"coati.dataset.tally" in old and b"row_stats" not in old
        path.write_bytes(old)
    prepare(tmp_path, data)
    assert len(counts) == 4 and "4 of 6 parts are done already" in capsys.readouterr().err
    assert contents(tmp_path / "arrow") == arrow


def test_counts_that_name_anything_else_are_not_unpickled(whole, tmp_path, capsys):
    data, arrow, _ = whole
    end_at(staging.StagingDir, "store", 3, tmp_path, data)
    for path in tmp_path.glob(".arrow.*.tmp/counts/part-*"):
        path.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "run").encode() + b"'\ntR.")
    prepare(tmp_path, data)
    assert "done already" not in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert contents(tmp_path / "arrow") == arrow
