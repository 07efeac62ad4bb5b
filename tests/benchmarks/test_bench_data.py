"""The data benchmark compares like with like: what `datasets.map` computes there are the ids and
masks of ours."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from coati.dataset import setup_conversation_template
from coati.dataset.data_types import DATA_TYPES
from coati.dataset.rows.formats import read_row
from tests.dataset.makers import chatml_tokenizer

ROOT = Path(__file__).parents[2]
# Ours ends what is learned with the end marker, theirs with the line break that the template writes
# after it.
NEW_LINE = "\n"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("bench_data")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def template():
    return setup_conversation_template(chatml_tokenizer(), {})


def both(bench, template, type: str, rows: int = 20):
    """``(theirs, ours)`` of some sample rows."""
    for line in open(ROOT / "examples" / "data" / f"{type}.jsonl", encoding="utf-8").readlines()[
        :rows
    ]:
        theirs = bench.CONVERT[type](json.loads(line), template.tokenizer, 10_000)
        yield (
            theirs,
            DATA_TYPES[type].tokenize(read_row(type, json.loads(line)), template, 10_000)[0][0],
        )


def same_but_for_line_breaks(
    ids: list[int], theirs: list[bool], ours: list[bool], template
) -> bool:
    differ = [token for token, one, other in zip(ids, theirs, ours, strict=False) if one != other]
    return {template.encoder.decode([token]) for token in differ} <= {NEW_LINE}


def test_sft(bench, template):
    for theirs, ours in both(bench, template, "sft"):
        assert theirs["keep"] and theirs["input_ids"][: ours["seq_length"]] == ours["input_ids"]
        masks = (
            [label != -100 for label in labels] for labels in (theirs["labels"], ours["labels"])
        )
        assert same_but_for_line_breaks(ours["input_ids"], *masks, template)


def test_prompt(bench, template):
    for theirs, ours in both(bench, template, "prompt"):
        assert theirs["input_ids"] == ours["input_ids"]


def test_preference(bench, template):
    for theirs, ours in both(bench, template, "preference"):
        for side in ("chosen", "rejected"):
            ids = ours[f"{side}_input_ids"]
            assert theirs[f"{side}_input_ids"][: len(ids)] == ids
            masks = (list(map(bool, row[f"{side}_loss_mask"])) for row in (theirs, ours))
            assert same_but_for_line_breaks(ids, *masks, template)


def test_kto(bench, template):
    for theirs, ours in both(bench, template, "kto"):
        assert theirs["prompt"] == ours["prompt"] and theirs["label"] == ours["label"]
        assert theirs["completion"][: len(ours["completion"])] == ours["completion"]
