"""Prepared rows from disk, evaluation batches that every rank has equally many of, and the
resumable sampler."""

import json

import pytest
from datasets import Dataset, DatasetDict

from coati.dataset.load.collator import DataCollatorForSupervisedDataset
from coati.dataset.load.loader import (
    EvaluationLoader,
    GlobalBatchLoader,
    StatefulDistributedSampler,
    load_tokenized_dataset,
    preparation_of,
    row_lengths,
)
from tests.tiny import tiny_tokenizer


def rows(*lengths: int, first: int = 0) -> Dataset:
    """Row i: ``lengths[i]`` tokens of value ``first + i``, all supervised."""
    ids = [[first + index] * length for index, length in enumerate(lengths)]
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "seq_length": list(lengths)})


@pytest.fixture
def arrow(tmp_path):
    """Two parts of 2 and 1 rows, an empty folder between them, and preparation.json beside them."""
    rows(1, 2).save_to_disk(tmp_path / "arrow" / "part-00000")
    rows(3, first=2).save_to_disk(tmp_path / "arrow" / "part-00001")
    (tmp_path / "arrow" / "part-00000-unfinished").mkdir()
    (tmp_path / "arrow" / "preparation.json").write_text(json.dumps({"rows": 3}))
    return tmp_path / "arrow"


def values(dataset) -> list[int]:
    return [row["input_ids"][0] for row in dataset]


def test_a_directory_of_parts_or_the_parts_in_the_order_given(arrow):
    assert values(load_tokenized_dataset(str(arrow))) == [0, 1, 2]
    parts = [str(arrow / "part-00001"), str(arrow / "part-00000")]
    assert values(load_tokenized_dataset(parts)) == [2, 0, 1]
    assert load_tokenized_dataset([]) is None


def test_what_was_said_at_preparation_is_found_from_a_part_too(arrow, tmp_path):
    assert preparation_of(str(arrow)) == preparation_of(str(arrow / "part-00001")) == {"rows": 3}
    assert preparation_of(str(tmp_path)) is None


def test_the_split_of_a_dictionary(tmp_path):
    DatasetDict({"train": rows(1), "validation": rows(2, 2)}).save_to_disk(tmp_path / "both")
    assert len(load_tokenized_dataset(str(tmp_path / "both"), "train")) == 1
    assert len(load_tokenized_dataset(str(tmp_path / "both"), "valid")) == 2
    with pytest.raises(ValueError, match="has the splits train, validation; expected 'test'"):
        load_tokenized_dataset(str(tmp_path / "both"), "test")


@pytest.mark.parametrize(
    "name, said", [("nowhere", "does not exist"), ("empty", "no prepared rows found")]
)
def test_what_is_no_prepared_data_is_named(tmp_path, name, said):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"--dataset .*{name}: {said}"):
        load_tokenized_dataset(str(tmp_path / name))


def test_lengths_are_read_or_counted():
    assert row_lengths(rows(3, 1)).tolist() == [3, 1]
    assert row_lengths(rows(3, 1).remove_columns("seq_length")).tolist() == [3, 1]


def test_fewer_rows_than_a_window():
    with pytest.raises(
        ValueError,
        match="holds 3 rows, one step needs 4 .--batch_size 1 x --accumulation_steps 2 x 2",
    ):
        GlobalBatchLoader(rows(1, 1, 1), list, batch_size=1, accumulation_steps=2, dp_size=2)


@pytest.mark.parametrize(
    "count, size, batch", [(5, 2, 2), (5, 1, 2), (4, 4, 1), (1, 3, 2), (7, 3, 2)]
)
def test_evaluation_sees_every_row_once_and_every_rank_has_equally_many_batches(count, size, batch):
    data = rows(*range(2, 2 + count))
    collate = DataCollatorForSupervisedDataset(tiny_tokenizer())
    ranks = [
        list(EvaluationLoader(data, collate, batch_size=batch, dp_rank=r, dp_size=size))
        for r in range(size)
    ]
    assert {len(batches) for batches in ranks} == {-(-count // (batch * size))}
    assert {tensors["input_ids"].shape[0] for batches in ranks for tensors in batches} == {batch}
    labels = [
        label
        for batches in ranks
        for tensors in batches
        for row in tensors["labels"].tolist()
        for label in row
    ]
    supervised = [label for label in labels if label != -100]
    assert sorted(supervised) == sorted(label for row in data for label in row["labels"])


def test_columns_for_people_are_not_read_while_training():
    data = rows(2, 2).add_column("inputs_decode", ["a", "b"])
    loader = GlobalBatchLoader(data, lambda found: [sorted(row) for row in found], batch_size=2)
    assert next(loader.global_batches(0)) == [[["input_ids", "labels", "seq_length"]] * 2]


def test_the_sampler_skips_what_was_done_once():
    sampler = StatefulDistributedSampler(
        list(range(10)), num_replicas=2, rank=1, shuffle=True, seed=3
    )
    sampler.set_epoch(1)
    whole = list(sampler)
    sampler.set_start_index(2)
    assert len(sampler) == 3 and list(sampler) == whole[2:]
    assert len(sampler) == 5 and list(sampler) == whole
    with pytest.raises(ValueError, match="start_index 6: expected 0 to 5"):
        sampler.set_start_index(6)
