"""Data prepared by ca46bcf, the release before the data types became objects, loads exactly.

``tests/data/prepared_ca46bcf`` holds, for each type, a source file and what it made of it;
``expected.json`` what its epoch orders and fingerprints were.
"""

import shutil
from pathlib import Path

import pytest

from coati.dataset import load_tokenized_dataset, prepare_dataset, setup_conversation_template
from coati.dataset.clean.cleaning import Cleaning
from coati.dataset.data_types import DATA_TYPES, type_of_row
from coati.dataset.fingerprint import LAYOUT, describe
from coati.dataset.load.epoch_order import EpochOrder, Mixture
from coati.dataset.load.loader import preparation_of, row_lengths
from coati.recipes.reference_model import rows_fingerprint
from coati.recipes.resume import data_fingerprint
from coati.utils.json_io import load_json
from tests.dataset.makers import chatml_tokenizer

BEFORE = Path(__file__).parents[1] / "data" / "prepared_ca46bcf"
EXPECTED = load_json(BEFORE / "expected.json")


@pytest.fixture(params=[name for name in DATA_TYPES if name in EXPECTED])
def type(request) -> str:
    return request.param


@pytest.fixture
def rows(type, tmp_path):
    shutil.copytree(BEFORE / type, tmp_path / "before")
    return load_tokenized_dataset(str(tmp_path / "before" / "arrow"))


@pytest.fixture
def template():
    return setup_conversation_template(chatml_tokenizer(), {})


def test_the_same_rows_are_made_today(type, rows, template, tmp_path):
    prepare_dataset(
        inputs=[tmp_path / "before" / "source.jsonl"],
        tokenizer=template.tokenizer,
        template=template,
        arrow_dir=tmp_path / "today",
        type=type,
        num_bins=1,
        max_length=400,
        seed=3,
        num_proc=1,
        show=None,
    )
    today = load_tokenized_dataset(str(tmp_path / "today"))
    assert len(rows) == preparation_of(str(tmp_path / "before" / "arrow"))["rows"] > 4
    assert today.features == rows.features and today.to_list() == rows.to_list()
    assert type_of_row(rows[0]).name == type


def test_epochs_have_the_same_order(type, rows):
    lengths = row_lengths(rows)
    mixture = Mixture(("a", "b"), (2, len(rows) - 2), (1.0, 2.0))
    orders = {
        "grouped": EpochOrder(lengths, seed=5),
        "shuffled": EpochOrder(lengths, seed=5, group_by_length=False),
        "in order": EpochOrder(lengths, seed=5, shuffle=False),
        "packed": EpochOrder(lengths, seed=5, pack_length=120),
        "mixed": EpochOrder(lengths, seed=5, mixture=mixture),
    }
    for name, order in orders.items():
        found = [[entry.tolist() for entry in order.entries(epoch)] for epoch in range(3)]
        assert found == EXPECTED[type]["orders"][name], name


def test_checkpoints_know_the_data_again(type, rows):
    assert data_fingerprint(rows) == EXPECTED[type]["data_fingerprint"]
    if (wanted := EXPECTED[type]["rows_fingerprint"]) is not None:
        assert rows_fingerprint(rows) == wanted


def test_an_interrupted_preparation_differs_in_the_layout_alone(type, template):
    """By which it begins anew: its rows were read without thoughts, tools and weights."""
    before = load_json(BEFORE / type / "arrow" / "made_from.json")
    settings = "jsonl type format split max_length seed num_bins num_samples_per_bin eval_ratio"
    given = {name: before[name] for name in settings.split()}
    files = {"inputs": [], "eval_inputs": [], "benchmark_files": []}
    assert describe(files, template, Cleaning(), **given) == before | files | {"layout": LAYOUT}
    assert before["layout"] == 3 < LAYOUT
