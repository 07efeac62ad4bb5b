"""The order of an epoch: little padding, other neighbors every time, sets mixed as asked."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coati.dataset.load.epoch_order import EpochOrder, Mixture, epoch_order
from coati.dataset.load.packing import padding_share

BATCH = 4


def chat_lengths(rows: int) -> np.ndarray:
    """Lengths spread as those of chats are, few of them equal."""
    return np.clip(np.random.default_rng(0).lognormal(5.5, 0.8, rows), 10, 2048).astype(np.int64)


def neighbors(order: np.ndarray) -> set[tuple[int, int]]:
    """Pairs of rows that are batched together."""
    batches = order[: len(order) // BATCH * BATCH].reshape(-1, BATCH).tolist()
    return {(a, b) for batch in batches for a in batch for b in batch if a < b}


@pytest.mark.parametrize("rows, same", [(100, 0.25), (300, 0.15), (1000, 0.10), (5000, 0.04)])
def test_neighbors_vary_while_padding_stays_low(rows, same):
    """Sorted exactly, more than 0.9 of the pairs of 300 rows would meet again; at random a half
    would be padding."""
    lengths = chat_lengths(rows)
    orders = [epoch_order(lengths, 0, epoch) for epoch in range(4)]
    pairs = [neighbors(order) for order in orders]
    again = [len(a & b) / len(a) for i, a in enumerate(pairs) for b in pairs[:i]]
    assert np.mean(again) < same
    padding = np.mean([padding_share(lengths[order], BATCH) for order in orders])
    random = padding_share(lengths[epoch_order(lengths, 0, 0, group_by_length=False)], BATCH)
    assert padding < 0.16 and padding < random / 3


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 1024, 1030, 2100])
@pytest.mark.parametrize("grouped", [True, False])
def test_every_row_once(rows, grouped):
    assert sorted(epoch_order(chat_lengths(rows), 1, 2, group_by_length=grouped).tolist()) == list(
        range(rows)
    )


def test_rows_of_every_length_come_last_in_some_epoch():
    """The last window of an epoch may be left out: it must not always be that of the longest
    rows."""
    lengths = np.arange(1, 41)
    last = [lengths[epoch_order(lengths, 0, epoch)[-8:]].mean() for epoch in range(12)]
    assert min(last) < 15 and max(last) > 25


SETS = st.lists(st.integers(1, 40), min_size=1, max_size=4)


@settings(derandomize=True, max_examples=100, deadline=None, database=None)
@given(SETS, st.data(), st.integers(0, 3))
def test_a_mixture_uses_the_rows_of_a_set_evenly(sizes, data, seed):
    """Counts follow the weights to within one row; over the epochs no row is used two times more
    than another."""
    weights = data.draw(
        st.lists(st.sampled_from([0.5, 1.0, 2.0, 7.0]), min_size=len(sizes), max_size=len(sizes))
    )
    try:
        mixture = Mixture(tuple(map(str, sizes)), tuple(sizes), tuple(weights))
    except ValueError as error:
        assert "would not give a single one" in str(error)
        return
    total = sum(sizes)
    assert sum(mixture.counts()) == total
    for count, weight in zip(mixture.counts(), weights, strict=True):
        assert abs(count - total * weight / sum(weights)) < 1
    used = np.zeros(total, dtype=int)
    for epoch in range(4):
        rows = mixture.rows(seed, epoch)
        assert len(rows) == total and rows.tolist() == mixture.rows(seed, epoch).tolist()
        np.add.at(used, rows, 1)
        for part in np.split(used, np.cumsum(sizes)[:-1]):
            assert part.max() - part.min() <= 1


def test_a_mixture_by_hand():
    """Weights 3 and 1 over 4 + 4 rows: 6 and 2 an epoch, so two epochs use the first set 3
    times."""
    mixture = Mixture(("a", "b"), (4, 4), (3.0, 1.0))
    assert mixture.counts() == [6, 2]
    first = mixture.rows(0, 0)
    second = mixture.rows(0, 1)
    assert sorted([*first[6:], *second[6:]]) == [4, 5, 6, 7]
    assert sorted([*first[:6], *second[:6]]) == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert mixture.describe() == (
        "--dataset_weights: of the 8 rows of an epoch, 6 of a (4 rows, each 1.5 times), 2 of b (4 "
        "rows, each 0.5 times)"
    )


def test_weights_that_do_not_fit_the_sets_are_named():
    with pytest.raises(ValueError) as error:
        Mixture(("a", "b"), (4, 4), (3.0,))
    assert "--dataset_weights has 1 values (3), --dataset has 2 paths (a b)" in str(error.value)
    with pytest.raises(
        ValueError, match="--dataset_weights 0.01: b would not give a single one of the 8 rows"
    ):
        Mixture(("a", "b"), (4, 4), (3.0, 0.01))


@pytest.mark.parametrize("pack_length", [None, 100])
def test_the_plan_of_a_mixture(pack_length):
    """Every epoch has its rows, in an order of its own, the same for whoever asks."""
    lengths = np.random.default_rng(0).integers(5, 60, 30)
    mixture = Mixture(("a", "b"), (20, 10), (1.0, 4.0))
    plans = [
        EpochOrder(lengths, seed=5, mixture=mixture, pack_length=pack_length) for _ in range(2)
    ]
    for epoch in range(3):
        entries = [np.atleast_1d(entry).tolist() for entry in plans[0].entries(epoch)]
        assert entries == [np.atleast_1d(entry).tolist() for entry in plans[1].entries(epoch)]
        assert len(entries) == plans[0].count(epoch)
        assert sorted(sum(entries, [])) == sorted(mixture.rows(5, epoch).tolist())
        if pack_length:
            assert all(lengths[entry].sum() <= pack_length for entry in entries)
