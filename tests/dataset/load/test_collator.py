"""Padding by lengths, on either side, with a pad token that is also the end token."""

from types import SimpleNamespace

import pytest
import torch

from coati.dataset import (
    DataCollatorForKTODataset,
    DataCollatorForPreferenceDataset,
    DataCollatorForPromptDataset,
    DataCollatorForSupervisedDataset,
)
from coati.dataset.load.collator import supervise_all

EOS = 2
ROWS = [
    {"input_ids": [5, 6, EOS], "labels": [-100, 6, EOS]},
    {"input_ids": [7, EOS, 8, 9, EOS], "labels": [-100, -100, -100, 9, EOS]},
]


def collator(
    side: str = "right", pad: int | None = EOS, **settings
) -> DataCollatorForSupervisedDataset:
    tokenizer = SimpleNamespace(pad_token_id=pad, eos_token_id=EOS, padding_side=side)
    return DataCollatorForSupervisedDataset(tokenizer, **settings)


def lists(batch: dict) -> dict[str, list[list[int]]]:
    return {name: tensor.tolist() for name, tensor in batch.items()}


@pytest.mark.parametrize("pad", [EOS, None])
def test_right(pad):
    """The end tokens inside and at the end of a row stay visible and supervised; those that pad do
    not."""
    assert lists(collator(pad=pad)(ROWS)) == {
        "input_ids": [[5, 6, 2, 2, 2], [7, 2, 8, 9, 2]],
        "attention_mask": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
        "labels": [[-100, 6, 2, -100, -100], [-100, -100, -100, 9, 2]],
    }


def test_left():
    assert lists(collator("left")(ROWS)) == {
        "input_ids": [[2, 2, 5, 6, 2], [7, 2, 8, 9, 2]],
        "attention_mask": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]],
        "labels": [[-100, -100, -100, 6, 2], [-100, -100, -100, 9, 2]],
    }


def test_longer_rows_are_cut_at_the_end():
    assert lists(collator(max_length=3)(ROWS)) == {
        "input_ids": [[5, 6, 2], [7, 2, 8]],
        "attention_mask": [[1, 1, 1], [1, 1, 1]],
        "labels": [[-100, 6, 2], [-100, -100, -100]],
    }


@pytest.mark.parametrize("multiple, width", [(1, 5), (2, 6), (4, 8), (5, 5)])
def test_the_width_is_a_multiple_for_split_sequences(multiple, width):
    batch = collator(pad_to_multiple_of=multiple)(ROWS)
    assert {tensor.shape for tensor in batch.values()} == {(2, width)}
    assert batch["attention_mask"].sum(1).tolist() == [3, 5]


def test_without_the_loss_mask_every_real_token_is_supervised_and_no_padding():
    assert collator(apply_loss_mask=False)(ROWS)["labels"].tolist() == [
        [5, 6, 2, -100, -100],
        [7, 2, 8, 9, 2],
    ]


@pytest.mark.parametrize("side", ["right", "left"])
def test_weights_are_padded_with_nothing_and_1_where_a_row_has_none(side):
    weighted = ROWS[0] | {"loss_weights": [0.0, 0.25, 0.5]}
    batch = collator(side)([weighted, ROWS[1]])
    padded = [0.0, 0.25, 0.5, 0.0, 0.0] if side == "right" else [0.0, 0.0, 0.0, 0.25, 0.5]
    assert batch["loss_weights"].tolist() == [padded, [1.0] * 5]
    assert batch["loss_weights"].dtype == torch.float32
    assert "loss_weights" not in collator(side)(ROWS)
    cut = collator(side, max_length=2)([weighted])
    assert cut["loss_weights"].tolist() == [[0.0, 0.25]]


def test_without_the_loss_mask_all_tokens_count_alike():
    weighted = ROWS[0] | {"loss_weights": [0.0, 0.25, 0.5]}
    assert "loss_weights" not in collator(apply_loss_mask=False)([weighted, ROWS[1]])


def test_a_blank_row_has_tokens_but_nothing_supervised():
    make = collator()
    batch = make([ROWS[0], make.blank(ROWS[1])])
    assert batch["labels"].tolist()[1] == [-100, -100, -100]
    assert batch["attention_mask"].tolist()[1] == [1, 1, 0]


def other(kind, side: str = "right", **settings):
    return kind(SimpleNamespace(pad_token_id=EOS, eos_token_id=EOS, padding_side=side), **settings)


def test_prompts_are_padded_on_the_left_and_keep_their_ground_truth():
    batch = other(DataCollatorForPromptDataset)(
        [{"input_ids": [5, EOS, 6], "gt_answer": "7"}, {"input_ids": [8], "gt_answer": None}]
    )
    assert batch["input_ids"].tolist() == [[5, 2, 6], [2, 2, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]] and batch["gt_answer"] == [
        "7",
        None,
    ]


def test_a_prompt_that_is_too_long_keeps_its_end(capsys):
    batch = other(DataCollatorForPromptDataset, max_length=2)([{"input_ids": [5, 6, 7]}])
    assert (
        batch["input_ids"].tolist() == [[6, 7]]
        and "lose their beginning" in capsys.readouterr().err
    )


PAIR = {
    "chosen_input_ids": [5, 6, EOS],
    "chosen_loss_mask": [False, True, True],
    "margin": 0.5,
    "rejected_input_ids": [5, EOS],
    "rejected_loss_mask": [False, True],
}
LONGER = {
    "chosen_input_ids": [7, EOS],
    "chosen_loss_mask": [False, True],
    "margin": None,
    "rejected_input_ids": [7, 8, 9, EOS],
    "rejected_loss_mask": [False, False, True, True],
}


def test_both_sides_of_a_pair_are_padded_to_the_longest_of_all():
    batch = other(DataCollatorForPreferenceDataset)([PAIR, LONGER])
    assert batch["chosen_input_ids"].tolist() == [[5, 6, 2, 2], [7, 2, 2, 2]]
    assert batch["chosen_attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert batch["chosen_loss_mask"].tolist() == [
        [False, True, True, False],
        [False, True, False, False],
    ]
    assert batch["reject_input_ids"].tolist() == [[5, 2, 2, 2], [7, 8, 9, 2]]
    assert batch["reject_attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["reject_loss_mask"].tolist() == [
        [False, True, False, False],
        [False, False, True, True],
    ]
    assert batch["margin"].tolist() == [0.5, 0.0]


def test_pairs_padded_on_the_left_and_without_the_mask():
    left = other(DataCollatorForPreferenceDataset, "left")([PAIR, LONGER])
    assert left["chosen_input_ids"].tolist() == [[2, 5, 6, 2], [2, 2, 7, 2]]
    assert left["chosen_loss_mask"].tolist() == [
        [False, False, True, True],
        [False, False, False, True],
    ]
    make = other(DataCollatorForPreferenceDataset, apply_loss_mask=False)
    batch = make([PAIR, make.blank(LONGER)])
    assert batch["chosen_loss_mask"].tolist() == [[True] * 3, [False] * 3]
    assert batch["reject_loss_mask"].tolist() == [[True, True, False], [False] * 3]


@pytest.mark.parametrize(
    "kind, row", [(DataCollatorForPreferenceDataset, LONGER), (DataCollatorForKTODataset, None)]
)
def test_a_row_that_would_lose_the_end_of_its_answer_is_refused(kind, row):
    row = row or {"prompt": [5, 6, 7], "completion": [EOS], "label": True}
    with pytest.raises(ValueError, match="a row of 4 tokens, max_length 3: .*raise --max_length"):
        other(kind, max_length=3)([row])
    other(kind, max_length=4)([row])


def judged(prompt, completion, label=True, **extra) -> dict:
    return {"prompt": prompt, "completion": completion, "label": label, **extra}


def test_judged_answers_and_the_next_rows_answers_in_rotation():
    rows = [judged([5], [6, EOS]), judged([7, 7], [8, EOS], False), judged([9], [EOS])]
    batch = other(DataCollatorForKTODataset, "left")(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 2, 2], [7, 7, 8, 2], [9, 2, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["loss_mask"].long().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1], [0, 1, 0, 0]]
    assert batch["label"].tolist() == [True, False, True]
    assert batch["kl_input_ids"].tolist() == [[5, 8, 2], [7, 7, 2], [9, 6, 2]]
    assert batch["kl_attention_mask"].tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 1]]
    assert batch["kl_loss_mask"].long().tolist() == [[0, 1, 1], [0, 0, 1], [0, 1, 1]]


def test_the_loaders_partner_wins_and_a_row_alone_has_none():
    batch = other(DataCollatorForKTODataset)(
        [judged([5], [6, EOS], kl_completion=[4]), judged([7], [8])]
    )
    assert batch["kl_input_ids"].tolist() == [[5, 4, 2], [7, 6, 2]]
    alone = other(DataCollatorForKTODataset)([judged([5], [6, EOS])])
    assert alone["kl_input_ids"].tolist() == [[5]] and not alone["kl_loss_mask"].any()


def test_a_kl_row_that_is_too_long_loses_the_beginning_of_its_prompt():
    batch = other(DataCollatorForKTODataset, max_length=4)(
        [judged([3, 4, 5], [6]), judged([7], [8, 9, EOS])]
    )
    assert batch["kl_input_ids"].tolist() == [[5, 8, 9, 2], [7, 6, 2, 2]]
    assert batch["kl_loss_mask"].long().tolist() == [[0, 1, 1, 1], [0, 1, 0, 0]]


@pytest.mark.parametrize("apply", [True, False])
def test_a_blank_judged_row_marks_nothing_and_is_nobodys_partner(apply):
    make = other(DataCollatorForKTODataset, apply_loss_mask=apply)
    batch = make([judged([5], [6]), make.blank(judged([7, 7, 7], [8])), judged([9], [4])])
    assert not batch["loss_mask"][1].any() and not batch["kl_loss_mask"][1].any()
    assert batch["kl_input_ids"].tolist() == [[5, 4], [7, 7], [9, 6]]
    assert batch["loss_mask"][0].tolist() == [not apply, True]


def test_a_blank_row_stays_blank_without_the_loss_mask():
    make = collator(apply_loss_mask=False)
    assert make([ROWS[0], make.blank(ROWS[1])])["labels"].tolist()[1] == [-100, -100, -100]


def tensors(**columns) -> dict:
    return {name: torch.tensor(values) for name, values in columns.items()}


def test_supervising_all_is_one_rule_for_labels_packs_and_masks():
    """Real tokens, but not the first of a row that padding or another row precedes, nor blank
    rows."""
    ids = [[9, 5, 6], [9, 9, 7], [5, 6, 9]]
    real = [[0, 1, 1], [0, 0, 1], [1, 1, 0]]
    labels = [[-100, -100, 6], [-100, -100, -100], [-100, 6, -100]]
    batch = tensors(input_ids=ids, attention_mask=real, labels=labels)
    found = supervise_all(batch)["labels"].tolist()
    assert found == [[-100, -100, 6], [-100] * 3, [5, 6, -100]]
    flagged = supervise_all(batch, blank=[False, False, True])["labels"].tolist()
    assert flagged == [[-100, -100, 6], [-100] * 3, [-100] * 3]
    pack = tensors(
        input_ids=[[5, 6, 7, 8, 9]], attention_mask=[[1] * 4 + [0]], position_ids=[[0, 1, 0, 1, 0]]
    )
    assert supervise_all(pack)["labels"].tolist() == [[-100, 6, -100, 8, -100]]
    masks = tensors(
        loss_mask=[[False, True, False], [False] * 3], attention_mask=[[1, 1, 0], [1, 1, 1]]
    ) | tensors(kl_loss_mask=[[True, False], [False] * 2], kl_attention_mask=[[1, 1], [1, 1]])
    found = supervise_all(masks)
    assert found["loss_mask"].tolist() == [[True, True, False], [False] * 3]
    assert found["kl_loss_mask"].tolist() == [[True, True], [False] * 2]
    assert batch["labels"].tolist() == labels  # the batch itself is left alone
