"""A position in other rows is refused, and what differs is said in words."""

from types import SimpleNamespace

import pytest
from datasets import Dataset

from coati.parallel.checkpoint import RunningState
from coati.recipes.resume import Resume, running_state


def rows(*lengths):
    ids = [list(range(length)) for length in lengths]
    return Dataset.from_dict({"input_ids": ids, "seq_length": [len(row) for row in ids]})


def settings(seed=42):
    data = SimpleNamespace(pack_length=None, dataset_weights=[])
    return SimpleNamespace(seed=seed, data=data, flags={"dataset": ["rows"], "seed": seed})


@pytest.mark.parametrize(
    "other, seed, said",
    [
        (rows(3, 4, 5), 42, "(rows 2 -> 3)"),
        (rows(3, 4, 5), 7, "(rows 2 -> 3, --seed 42 -> 7)"),
        (rows(4, 3), 42, "(2 too, of other lengths or tokens)"),
    ],
)
def test_what_differs_is_said_in_words(tmp_path, other, seed, said):
    data = running_state(Resume(), settings(), rows(3, 4)).data
    resume = Resume(folder=tmp_path, state=RunningState(step=3, data=data))
    with pytest.raises(ValueError) as refused:
        running_state(resume, settings(seed), other)
    text = str(refused.value)
    assert said in text and str(tmp_path) in text and "--checkpoint_weights_only" in text
    assert "the same --dataset, --seed," in text and "--packing" not in text
    assert "{" not in text and "fingerprint" not in text
    assert running_state(resume, settings(), rows(3, 4)) is resume.state
