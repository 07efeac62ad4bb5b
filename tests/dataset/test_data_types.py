"""The table of data types: the columns of their files, how rows are told apart, and what a new one
takes."""

import pytest

from coati.dataset.data_types import DATA_TYPES, TOKEN_COLUMNS, type_of_row, types_of
from coati.dataset.rows.formats import CONTENTS, DATASET_FORMATS, FORMATS_OF
from coati.dataset.types.data_type import Side

IDS = "list<item: int32>"
MASK = "list<item: bool>"
TEXTS = "list<item: string>"
COMMON = {"seq_length": "int32", "seq_category": "string"}
# As prepared data sets of earlier releases have them.
FILES = {
    "sft": {
        "input_ids": IDS,
        "labels": IDS,
        "inputs_decode": "string",
        "labels_decode": TEXTS,
        **COMMON,
    },
    "prompt": {"input_ids": IDS, "inputs_decode": "string", **COMMON, "gt_answer": "string"},
    "preference": {
        "chosen_input_ids": IDS,
        "chosen_loss_mask": MASK,
        "chosen_label_decode": TEXTS,
        "rejected_input_ids": IDS,
        "rejected_loss_mask": MASK,
        "rejected_label_decode": TEXTS,
        "margin": "float",
        **COMMON,
    },
    "kto": {
        "prompt": IDS,
        "completion": IDS,
        "label": "bool",
        "input_id_decode": "string",
        "completion_decode": "string",
        **COMMON,
    },
    "text": {
        "input_ids": IDS,
        "labels": IDS,
        "document": "bool",
        "inputs_decode": "string",
        **COMMON,
    },
    "scored": {
        "input_ids": IDS,
        "loss_mask": MASK,
        "reward": "float",
        "inputs_decode": "string",
        "labels_decode": TEXTS,
        **COMMON,
    },
}


@pytest.mark.parametrize("type", DATA_TYPES)
def test_the_arrow_columns_are_those_of_earlier_releases(type):
    schema = DATA_TYPES[type].schema
    assert [(field.name, str(field.type)) for field in schema] == list(FILES[type].items())


def test_token_columns():
    found = {type.name: type.token_columns for type in DATA_TYPES.values()}
    assert found == {
        "sft": ("input_ids",),
        "prompt": ("input_ids",),
        "preference": ("chosen_input_ids", "rejected_input_ids"),
        "kto": ("prompt", "completion"),
        "text": ("input_ids",),
        "scored": ("input_ids",),
    }
    # The order in which checkpoints of earlier releases hashed them.
    wanted = ("input_ids", "chosen_input_ids", "rejected_input_ids", "prompt", "completion")
    assert wanted == TOKEN_COLUMNS


@pytest.mark.parametrize("type", DATA_TYPES)
def test_rows_are_told_apart_by_their_columns(type):
    assert type_of_row(dict.fromkeys(FILES[type])).name == type
    assert DATA_TYPES[type] in types_of(DATA_TYPES[type].needed_columns)


def test_rows_for_sft_can_serve_as_prompts_and_not_the_reverse():
    assert [type.name for type in types_of(FILES["sft"])] == ["sft", "prompt"]
    assert [type.name for type in types_of(FILES["prompt"])] == ["prompt"]
    with pytest.raises(ValueError, match="columns text, label is of no data type"):
        type_of_row({"text": "a", "label": 1})


def test_every_type_reads_known_contents_and_has_a_format():
    for type in DATA_TYPES.values():
        assert type.reads and set(type.reads) <= set(CONTENTS) and FORMATS_OF[type.name]
    assert {format.holds for format in DATASET_FORMATS} == set(CONTENTS)
    by_holds = {format.holds: format.types for format in DATASET_FORMATS}
    assert by_holds == {
        "pair": ("preference", "prompt", "scored"),
        "judged": ("kto", "prompt", "scored"),
        "conversation": ("sft", "prompt", "scored"),
        "prompt": ("prompt",),
        "text": ("sft", "text"),
        "document": ("text",),
        "scored": ("scored",),
    }
    # To someone with rows that have no score, the type that wants one is not named.
    suggested = {format.holds: format.suggested for format in DATASET_FORMATS}
    assert suggested["judged"] == ("kto", "prompt") and suggested["scored"] == ("scored",)


def test_the_sides_of_a_row():
    pair = {"chosen_input_ids": [1, 2, 3], "chosen_loss_mask": [False, True, True]}
    pair |= {"rejected_input_ids": [1, 4], "rejected_loss_mask": [False, True]}
    chosen, rejected = DATA_TYPES["preference"].sides(pair)
    assert (chosen.name, chosen.prompt(), chosen.end(), chosen.supervised()) == (
        "chosen",
        [1],
        3,
        2,
    )
    assert (rejected.name, rejected.ids, rejected.ends_with([[4]])) == ("rejected", [1, 4], True)
    (judged,) = DATA_TYPES["kto"].sides({"prompt": [5, 6], "completion": [7]})
    assert (judged.ids, judged.mask()) == ([5, 6, 7], [False, False, True])
    (learned,) = DATA_TYPES["sft"].sides({"input_ids": [1, 2, 3], "labels": [-100, 2, -100]})
    assert (learned.prompt(), learned.end(), learned.ends_with([[1, 2], [3]])) == ([1], 2, True)
    (scored,) = DATA_TYPES["scored"].sides({"input_ids": [1, 2], "loss_mask": [False, True]})
    assert (scored.prompt(), scored.supervised()) == ([1], 1)
    (asked,) = DATA_TYPES["prompt"].sides({"input_ids": [8, 9]})
    assert (asked.prompt(), asked.end(), asked.supervised()) == ([8, 9], 0, 0)
    assert Side("", [], []).prompt() == []


@pytest.mark.parametrize("type", DATA_TYPES)
def test_every_type_names_its_collator(type):
    collator = DATA_TYPES[type].collator()
    assert collator.__name__.startswith("DataCollatorFor") and hasattr(collator, "blank")
