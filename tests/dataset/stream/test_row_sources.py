"""Where a stream's rows come from: files by their stamps, data sets of the hub by their commit."""

import json
import os
import shutil
from itertools import islice

import pytest

from coati.dataset.stream.row_sources import (
    WHOLE,
    FileSource,
    change_of,
    is_hub_name,
    revisions_of,
    sources_of,
)
from tests.dataset.stream.streams import batches, loader, said, stream, talk, write_lines

ROWS = [talk(f"row {number}") for number in range(20)]


@pytest.fixture
def file(tmp_path):
    return write_lines(tmp_path / "a.jsonl", ROWS)


def stamp(path):
    return json.loads(json.dumps(FileSource(path).stamp()))


def test_a_file_is_the_same_wherever_it_lies_and_whenever_it_was_written(file, tmp_path):
    before = stamp(file)
    copy = shutil.copyfile(file, tmp_path / "b.jsonl")
    os.utime(file, ns=(1, 1))
    assert change_of(before, stamp(copy)) is None and change_of(before, stamp(file)) is None


def test_other_bytes_are_noticed_by_size_or_by_hash(file):
    before = stamp(file)
    text = file.read_text()
    file.write_text(text.replace("row 7", "row X"))
    assert "a.jsonl holds other bytes" in change_of(before, stamp(file))
    file.write_text(text + "{}\n")
    assert f"has {len(text) + 3} bytes, it had {len(text)}" in change_of(before, stamp(file))


def test_of_a_large_file_the_time_counts_too_and_can_be_given_back(tmp_path):
    file = tmp_path / "large.jsonl"
    file.write_bytes(b"x" * (2 * WHOLE))
    before = stamp(file)
    changed = before["changed"]
    os.utime(file, ns=(changed + 5 * 10**9, changed + 5 * 10**9))
    said = change_of(before, stamp(file))
    assert f"touch -d @{changed // 10**9}.{changed % 10**9:09d}" in said
    command = said.partition("touch ")[2].split()
    assert os.spawnlp(os.P_WAIT, "touch", "touch", *command) == 0
    assert change_of(before, stamp(file)) is None
    elsewhere = shutil.copyfile(file, tmp_path / "copy.jsonl")
    assert change_of(before, stamp(elsewhere)) is None


@pytest.mark.parametrize(
    "path, is_name",
    [
        ("owner/name", True),
        ("owner/name:subset", True),
        ("owner/name:subset@validation", True),
        ("owner/name@train", True),
        ("./owner/name", False),
        ("a.jsonl", False),
        ("one/two/three", False),
        ("one/two.jsonl", False),
        ("one/two.txt.gz#3", False),
    ],
)
def test_names_of_the_hub(tmp_path, monkeypatch, path, is_name):
    monkeypatch.chdir(tmp_path)
    assert is_hub_name(path) == is_name
    (tmp_path / "owner").mkdir()
    assert not is_hub_name(path)


class Hub:
    """A stand-in for the hub's client: data sets that lie in ``folder``, read by datasets' own
    streaming. Each commit is a folder of shards."""

    def __init__(self, folder, monkeypatch) -> None:
        import datasets
        import huggingface_hub

        self.folder = folder
        self.newest = "c1"
        self.asked: list[tuple] = []
        self._load = datasets.load_dataset
        monkeypatch.setattr(datasets, "load_dataset", self.load_dataset)
        # A class: modules that are imported meanwhile name it in their types.
        client = type("HfApi", (), {"dataset_info": lambda _, name: self.dataset_info(name)})
        monkeypatch.setattr(huggingface_hub, "HfApi", client)

    def commit(self, name: str, shards: list[list[dict]], split: str = "train") -> None:
        for number, rows in enumerate(shards):
            write_lines(self.folder / name / split / f"{number}.jsonl", rows)
        self.newest = name

    def dataset_info(self, name: str):
        if name != "owner/talks":
            raise OSError(f"404 Client Error: {name} not found")
        return type("Info", (), {"sha": self.newest})

    def load_dataset(self, name, subset=None, *, streaming, revision):
        assert streaming
        self.asked.append((name, subset, revision))
        splits = sorted(self.folder.joinpath(revision).iterdir())
        files = {split.name: sorted(map(str, split.iterdir())) for split in splits}
        return self._load("json", data_files=files, streaming=True)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = Hub(tmp_path / "hub", monkeypatch)
    found.commit("c1", [ROWS[:12], ROWS[12:]])
    return found


def test_a_data_set_of_the_hub_is_streamed_shard_by_shard(hub, tmp_path):
    found = sources_of("owner/talks")
    assert [source.name for source in found] == [
        "owner/talks (shard 0)",
        "owner/talks (shard 1)",
    ]
    assert [line for line, _ in found[1].rows()] == list(range(1, 9))
    assert hub.asked == [("owner/talks", None, "c1")]
    streamed = stream("owner/talks", buffer=0)
    local = stream(write_lines(tmp_path / "rows.jsonl", ROWS), buffer=0)
    ours, theirs = (
        [row for batch in batches(loader(one), 5) for row in batch] for one in (local, streamed)
    )
    assert list(map(said, ours)) == list(map(said, theirs)) and len(ours) == 20


def test_it_goes_on_at_its_place_in_the_commit_that_was_read(hub):
    first = loader(stream("owner/talks", buffer=6))
    whole = [
        list(map(said, batch)) for batch in batches(loader(stream("owner/talks", buffer=6)), 9)
    ]
    list(batches(first, 4))
    stamps = [source.stamp() for source in sources_of("owner/talks")]
    hub.commit("c2", [[talk("other")] * 20])
    assert revisions_of(stamps) == {"owner/talks": "c1"}
    assert "is of another commit" in change_of(stamps[0], sources_of("owner/talks")[0].stamp())
    again = sources_of("owner/talks", revisions=revisions_of(stamps))
    assert [source.stamp() for source in again] == stamps
    hub.newest = "c1"
    found = loader(stream("owner/talks", buffer=6, state=first.state_dict()))
    rest = list(islice(batches(found, 5, first.position_after(0, 0)), 5))
    assert [list(map(said, batch)) for batch in rest] == whole[4:]


def test_subset_and_split_are_asked_for(hub):
    hub.commit("c1", [ROWS[:3]], split="validation")
    [found] = sources_of("owner/talks:part@validation")
    assert len(list(found.rows())) == 3 and hub.asked == [("owner/talks", "part", "c1")]
    with pytest.raises(ValueError, match="has the splits train, validation"):
        sources_of("owner/talks@test")


def test_what_the_hub_does_not_have_or_cannot_be_reached_for_is_named(hub):
    with pytest.raises(ValueError, match=r"owner/none: there is no such file or folder, nor.*404"):
        sources_of("owner/none")


def test_a_connection_that_breaks_ends_the_run_by_name(hub, monkeypatch):
    [first, _] = sources_of("owner/talks")

    class Broken(Exception):
        pass

    def rows():
        yield ROWS[0]
        raise Broken("connection reset")

    monkeypatch.setattr(type(first), "_rows", property(lambda self: rows()))
    with pytest.raises(OSError, match=r"owner/talks \(shard 0\): cannot be read on \(connection"):
        list(first.rows())
