"""Rows cut by a budget of tokens, by hand; and the rows of a step taken apart and put back."""

import logging
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from coati.parallel.objective import concatenate
from coati.parallel.options import ParallelOptions
from coati.parallel.token_budget import (
    RowsOfAStep,
    TokenBudget,
    by_tokens,
    restored,
    row_lengths,
    with_count,
)

LENGTHS = [3, 9, 4, 2, 8, 5]


@pytest.mark.parametrize(
    "budget, expected",
    [
        # 2 x 9 = 18; 3 x 5 = 15, a fourth would be 20; the rest
        (18, [[1, 4], [5, 2, 0], [3]]),
        # 9 alone: 2 x 9 > 16; 8 and 5 are 16; 4, 3, 2 are 12
        (16, [[1], [4, 5], [2, 0, 3]]),
        # 9 and 8 are longer than the budget and stay alone
        (6, [[1], [4], [5], [2], [0, 3]]),
        (54, [[0, 1, 2, 3, 4, 5]]),  # all of them, in their order
    ],
)
def test_padded_rows_cost_the_longest_of_them(budget, expected):
    assert by_tokens(LENGTHS, budget) == expected


@pytest.mark.parametrize(
    "budget, expected",
    [
        (16, [[0, 1, 2], [3, 4, 5]]),  # 16 and 15, in their order
        (12, [[0, 1], [2, 3], [4], [5]]),  # 12; 6 and not 14; 8 and not 13; 5
        (6, [[0], [1], [2, 3], [4], [5]]),  # 3 and 9 is too much, 9 alone too
        (31, [[0, 1, 2, 3, 4, 5]]),
    ],
)
def test_rows_without_padding_cost_their_tokens(budget, expected):
    assert by_tokens(LENGTHS, budget, padded=False) == expected


def test_pairs_stay_together():
    """Pairs (3, 9), (4, 2), (8, 5). Padded: 2 x 9 = 18, with the third 4 x 9 = 36 > 35."""
    assert by_tokens(LENGTHS, 36, together=2) == [[0, 1, 4, 5], [2, 3]]
    assert by_tokens(LENGTHS, 35, together=2) == [[0, 1], [4, 5, 2, 3]]
    assert by_tokens(LENGTHS, 18, together=2, padded=False) == [[0, 1, 2, 3], [4, 5]]


def test_widths_are_multiples():
    """Sequence parallelism pads 9 to 12 and 3 to 4: 2 x 12 = 24."""
    assert by_tokens([9, 8, 3], 23, multiple=4) == [[0], [1, 2]]
    assert by_tokens([9, 8, 3], 24, multiple=4) == [[0, 1], [2]]


def test_every_row_is_in_one_micro_batch_and_none_is_over_the_budget():
    drawn = torch.randint(2, 200, (97,), generator=torch.Generator().manual_seed(0)).tolist()
    for padded in (True, False):
        cuts = by_tokens(drawn, 512, padded=padded)
        assert sorted(row for cut in cuts for row in cut) == list(range(97))
        for cut in cuts:
            lengths = [drawn[row] for row in cut]
            assert (len(cut) * max(lengths) if padded else sum(lengths)) <= 512


def test_without_a_budget_rows_are_what_is_asked_for():
    """Two of the longest rows, 9 tokens each, which sequence parallelism pads to 16."""
    options = ParallelOptions(plugin="3d", tp=8, enable_sequence_parallelism=True)
    budget = TokenBudget.of(options, 2, 9)
    assert options.sequence_multiple == 8 and budget.tokens == 32
    assert budget.cut([9, 7, 3, 8]) == [[0, 3], [1, 2]]
    assert TokenBudget.of(replace(options, tokens_per_batch=16), 2, 9).tokens == 16


class Read(list):
    """Counts how often its entries are asked for."""

    times = 0

    def __getitem__(self, index):
        self.times += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("padded", [True, False])
def test_the_work_grows_with_the_rows_alone(padded):
    """However many of them a micro-batch takes."""
    lengths = Read([5, 3] * 500)
    assert len(by_tokens(lengths, 2000, padded=padded)) == (2 if not padded else 3)
    assert lengths.times <= 3 * len(lengths)


def test_as_many_as_the_others_have():
    assert with_count([[0, 1, 2], [3, 4]], 3) == [[0, 1], [2], [3, 4]]
    assert with_count([[0, 1, 2], [3, 4]], 5) == [[0], [1], [2], [3], [4]]
    assert with_count([[0, 1, 2, 3, 4, 5]], 2, together=2) == [[0, 1, 2, 3], [4, 5]]
    assert with_count([[0, 1], [2], [3]], 2) == [[0, 1], [2, 3]]
    assert with_count([[0], [1]], 2) == [[0], [1]]


@pytest.mark.parametrize("together, lengths", [(1, [9, 30, 2]), (2, [9, 15, 2, 2])])
def test_a_longer_row_is_said_once(together, lengths, caplog):
    budget = TokenBudget(20)
    with caplog.at_level(logging.WARNING, logger="coati"):
        TokenBudget(60).cut(lengths, together)
        assert not caplog.records
        budget.cut(lengths, together)
        budget.cut(lengths, together)
    (record,) = caplog.records
    what = "a row" if together == 1 else "2 rows that belong together"
    assert f"--tokens_per_batch 20: {what} of 30 tokens" in record.message


def step_rows():
    """Two micro-batches, of rows of 3, 5, 2 and 4 tokens, one of them with weights; a value for
    each supervised token."""
    first = {
        "input_ids": torch.tensor([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        "labels": torch.tensor([[-100, 2, -100, -100, -100], [-100, 5, 6, 7, -100]]),
        "teacher": torch.tensor([[2.0], [5.0], [6.0], [7.0]]),
        "row": torch.tensor([0, 1]),
    }
    second = {
        "input_ids": torch.tensor([[9, 10, 0, 0], [11, 12, 13, 14]]),
        "attention_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]),
        "labels": torch.tensor([[-100, 10, -100, -100], [-100, -100, 13, 14]]),
        "teacher": torch.tensor([[10.0], [13.0], [14.0]]),
        "row": torch.tensor([2, 3]),
        "loss_weights": torch.full((2, 4), 0.5),
    }
    return [first, second]


def test_rows_are_taken_as_wide_as_they_need_with_what_belongs_to_them():
    batches = step_rows()
    lengths = row_lengths(batches)
    assert lengths == [3, 5, 2, 4]
    taken = RowsOfAStep(batches, lengths, ("teacher",)).take([3, 0])
    assert taken["input_ids"].tolist() == [[11, 12, 13, 14], [1, 2, 3, 0]]
    assert taken["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert taken["labels"].tolist() == [[-100, -100, 13, 14], [-100, 2, -100, -100]]
    assert taken["teacher"].tolist() == [[13.0], [14.0], [2.0]]
    assert taken["row"].tolist() == [3, 0]
    # The first micro-batch has no weights: all count as 1.
    assert taken["loss_weights"].tolist() == [[0.5] * 4, [1.0] * 4]
    wide = RowsOfAStep(batches, lengths, ("teacher",), multiple=4).take([2])
    assert wide["input_ids"].tolist() == [[9, 10, 0, 0]]


def test_rows_padded_on_the_left_keep_their_width():
    batch = {
        "input_ids": torch.tensor([[0, 0, 1, 2], [3, 4, 5, 6]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
    }
    lengths = row_lengths([batch])
    assert lengths == [4, 4]  # what a forward of each takes
    assert RowsOfAStep([batch], lengths).take([0])["input_ids"].tolist() == [[0, 0, 1, 2]]


def test_a_key_of_some_micro_batches_alone_is_named():
    first, second = step_rows()
    del second["row"]
    with pytest.raises(ValueError, match="only some micro-batches of a step have row"):
        concatenate([first, second])


def test_numbers_return_to_the_order_of_the_rows():
    found = [torch.tensor([30.0, 0.0]), torch.tensor([10.0, 20.0])]
    assert_close(restored(found, [[3, 0], [1, 2]]), torch.tensor([0.0, 10.0, 20.0, 30.0]))
