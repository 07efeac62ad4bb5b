"""Padding by lengths, on either side, with a pad token that is also the end token."""

from types import SimpleNamespace

import pytest

from coati.dataset import DataCollatorForSupervisedDataset

EOS = 2
ROWS = [
    {"input_ids": [5, 6, EOS], "labels": [-100, 6, EOS]},
    {"input_ids": [7, EOS, 8, 9, EOS], "labels": [-100, -100, -100, 9, EOS]},
]


def collator(side: str = "right", pad: int | None = EOS, **settings) -> DataCollatorForSupervisedDataset:
    tokenizer = SimpleNamespace(pad_token_id=pad, eos_token_id=EOS, padding_side=side)
    return DataCollatorForSupervisedDataset(tokenizer, **settings)


def lists(batch: dict) -> dict[str, list[list[int]]]:
    return {name: tensor.tolist() for name, tensor in batch.items()}


@pytest.mark.parametrize("pad", [EOS, None])
def test_right(pad):
    """The end tokens inside and at the end of a row stay visible and supervised; those that pad do not."""
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
    assert collator(apply_loss_mask=False)(ROWS)["labels"].tolist() == [[5, 6, 2, -100, -100], [7, 2, 8, 9, 2]]


def test_a_blank_row_has_tokens_but_nothing_supervised():
    make = collator()
    batch = make([ROWS[0], make.blank(ROWS[1])])
    assert batch["labels"].tolist()[1] == [-100, -100, -100]
    assert batch["attention_mask"].tolist()[1] == [1, 1, 0]
