"""Packs: every row once and whole, none over the limit, few of them; and the tensors that a batch
of packs becomes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coati.dataset.load.collator import DataCollatorForSupervisedDataset
from coati.dataset.load.epoch_order import EpochOrder
from coati.dataset.load.packing import (
    PackCollator,
    best_fit_decreasing,
    packs,
    padding_share,
    swap_rows,
)
from tests.tiny import tiny_tokenizer

FAST = settings(derandomize=True, max_examples=150, deadline=None, database=None)
LENGTHS = st.lists(st.integers(1, 64), max_size=60).map(np.asarray)


def totals(found: list[np.ndarray], lengths: np.ndarray) -> list[int]:
    return [int(lengths[pack].sum()) for pack in found]


def first_fit_decreasing(lengths: np.ndarray, limit: int) -> int:
    """The number of packs of the plainest rule that has the bound 11/9 too."""
    rooms: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        at = next((i for i, room in enumerate(rooms) if room >= length), None)
        if at is None:
            rooms.append(limit - length)
        else:
            rooms[at] -= length
    return len(rooms)


@FAST
@given(LENGTHS, st.integers(64, 200), st.none() | st.integers(0, 9))
def test_every_row_once_and_no_pack_over_the_limit(lengths, limit, seed):
    found = packs(
        lengths.astype(np.int64), limit, None if seed is None else np.random.default_rng(seed)
    )
    rows = [int(row) for pack in found for row in pack]
    assert sorted(rows) == list(range(len(lengths)))
    assert all(0 < total <= limit for total in totals(found, lengths))


@FAST
@given(LENGTHS, st.integers(64, 200))
def test_packs_are_few(lengths, limit):
    """At most 11/9 of the least number (no fewer than all tokens need) plus 4; no two could be
    joined."""
    found = packs(lengths.astype(np.int64), limit)
    least = -(-int(lengths.sum()) // limit)
    halves = sum(length > limit / 2 for length in lengths)
    assert len(found) <= first_fit_decreasing(lengths, limit) * 11 / 9 + 4
    assert len(found) >= max(least, halves)
    full = sorted(totals(found, lengths))
    assert len(full) < 2 or full[0] + full[1] > limit


@FAST
@given(LENGTHS, st.integers(64, 200), st.integers(0, 5))
def test_their_number_does_not_depend_on_the_draw(lengths, limit, seed):
    lengths = lengths.astype(np.int64)
    drawn = packs(lengths, limit, np.random.default_rng(seed))
    assert len(drawn) == len(packs(lengths, limit))
    again = packs(lengths, limit, np.random.default_rng(seed))
    assert [pack.tolist() for pack in drawn] == [pack.tolist() for pack in again]


def test_best_fit_by_hand():
    """Limit 10: 8 | 7 | 6, then 4 beside 6, 3 beside 7, 2 beside 8: each fills its pack to the
    brim."""
    assert best_fit_decreasing(np.array([2, 3, 4, 6, 7, 8]), 10).tolist() == [0, 1, 2, 2, 1, 0]
    # 5 could go beside 3 (room 7) or 4 (room 6): the tighter place is taken.
    assert best_fit_decreasing(np.array([8, 7, 2, 1]), 10).tolist() == [0, 1, 0, 1]


def test_a_row_that_fits_nowhere_is_named():
    with pytest.raises(ValueError, match="a row of 11 tokens does not fit into a pack of 10"):
        best_fit_decreasing(np.array([3, 11]), 10)


def test_no_rows():
    none = np.zeros(0, dtype=np.int64)
    assert packs(none, 8) == packs(none, 8, np.random.default_rng(0)) == []


def test_as_good_as_first_fit_decreasing_on_lengths_as_chats_have_them():
    random = np.random.default_rng(0)
    for limit in (512, 2048):
        lengths = np.clip(random.lognormal(5.0, 0.9, 2000), 8, limit).astype(np.int64)
        found = packs(lengths, limit, random)
        assert len(found) <= first_fit_decreasing(lengths, limit)
        assert lengths.sum() / (len(found) * limit) > 0.98


def company(found: list[np.ndarray]) -> set[tuple[int, int]]:
    return {(a, b) for pack in found for a in pack.tolist() for b in pack.tolist() if a < b}


def test_other_rows_meet_in_another_epoch():
    """300 rows of 250 lengths: best fit alone would put nearly the same rows together in every
    epoch."""
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 0.8, 300), 10, 1024).astype(np.int64)
    fixed = [company(packs_without_exchange(lengths, 1024, seed)) for seed in (1, 2)]
    drawn = [company(packs(lengths, 1024, np.random.default_rng(seed))) for seed in (1, 2)]
    assert len(fixed[0] & fixed[1]) / len(fixed[0]) > 0.6
    assert len(drawn[0] & drawn[1]) / len(drawn[0]) < 0.2


def packs_without_exchange(lengths: np.ndarray, limit: int, seed: int) -> list[np.ndarray]:
    pack_of = best_fit_decreasing(lengths, limit, np.random.default_rng(seed))
    return [np.flatnonzero(pack_of == pack) for pack in range(pack_of.max() + 1)]


def test_exchange_keeps_the_packs_themselves():
    lengths = np.array([5, 5, 4, 4, 1])
    pack_of = np.array([0, 1, 0, 1, 0])
    for seed in range(20):
        moved = swap_rows(pack_of, lengths, 10, np.random.default_rng(seed))
        assert (
            sorted(np.bincount(moved).tolist()) == [2, 3]
            and np.bincount(moved, weights=lengths).max() <= 10
        )


def test_padding_share_by_hand():
    """Batches (4, 2) and (3): 9 of 4 + 4 + 3 = 11 positions are tokens."""
    assert padding_share([4, 2, 3], 2) == pytest.approx(2 / 11)


def collators(**options) -> tuple[DataCollatorForSupervisedDataset, PackCollator]:
    rows = DataCollatorForSupervisedDataset(tiny_tokenizer(), **options)
    return rows, PackCollator(rows)


ROWS = [
    {"input_ids": [10, 11, 12], "labels": [10, -100, 12]},
    {"input_ids": [20, 21], "labels": [-100, 21]},
    {"input_ids": [30], "labels": [30]},
]


def test_a_batch_of_packs_by_hand():
    """What would be asked of the token before a row (10, 30) is asked of nobody; padding stands at
    position 0."""
    _, collate = collators()
    batch = collate([[ROWS[0], ROWS[1]], [ROWS[2]]])
    pad = tiny_tokenizer().pad_token_id
    assert batch["input_ids"].tolist() == [[10, 11, 12, 20, 21], [30, pad, pad, pad, pad]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 0, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0] * 5]
    assert batch["labels"].tolist() == [[-100, -100, 12, -100, 21], [-100] * 5]


def test_rows_are_cut_and_all_tokens_supervised_as_without_packing():
    _, collate = collators(max_length=2, apply_loss_mask=False, pad_to_multiple_of=4)
    batch = collate([[ROWS[0], ROWS[1]]])
    assert batch["input_ids"].tolist() == [[10, 11, 20, 21]] and batch["labels"].tolist() == [
        [-100, 11, -100, 21]
    ]


TOKENS = st.lists(st.integers(0, 300), min_size=1, max_size=12)
SUPERVISED = TOKENS.flatmap(
    lambda ids: st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)).map(
        lambda kept: {
            "input_ids": ids,
            "labels": [i if k else -100 for i, k in zip(ids, kept, strict=True)],
        }
    )
)


def asked(batch: dict) -> list[tuple[tuple[int, ...], int]]:
    """(what a token is predicted from, the token) for every label, sorted; rows told apart by
    positions or masks."""
    found = []
    positions = batch.get("position_ids", batch["attention_mask"].cumsum(1) - 1)
    columns = [batch["input_ids"], batch["labels"], batch["attention_mask"], positions]
    for ids, labels, mask, position in zip(*(column.tolist() for column in columns), strict=True):
        for at in range(1, len(ids)):
            if labels[at] != -100:
                assert mask[at] and labels[at] == ids[at]
                found.append((tuple(ids[at - position[at] : at]), labels[at]))
    return sorted(found)


@FAST
@given(
    st.lists(SUPERVISED, min_size=1, max_size=8),
    st.sampled_from(["left", "right"]),
    st.integers(12, 30),
)
def test_padding_side_and_packing_move_no_label(rows, side, limit):
    """Every label is predicted from the same tokens in packs and with padding on either side."""
    tokenizer = tiny_tokenizer()
    side, tokenizer.padding_side = tokenizer.padding_side, side
    try:
        collate = DataCollatorForSupervisedDataset(tokenizer)
        found = packs(
            np.array([len(row["input_ids"]) for row in rows]), limit, np.random.default_rng(0)
        )
        packed = PackCollator(collate)([[rows[i] for i in pack] for pack in found])
        expected = sorted(
            (tuple(row["input_ids"][:at]), label)
            for row in rows
            for at, label in enumerate(row["labels"])
            if at and label != -100
        )
        assert asked(collate(rows)) == expected and asked(packed) == expected
    finally:
        tokenizer.padding_side = side


def test_the_plan_of_packs_is_the_same_whoever_asks_and_counts_packs():
    lengths = np.random.default_rng(0).integers(5, 60, 200)
    plans = [EpochOrder(lengths, seed=3, pack_length=64) for _ in range(2)]
    for epoch in (2, 0):
        first, second = ([pack.tolist() for pack in plan.entries(epoch)] for plan in plans)
        assert first == second and len(first) == plans[0].count(epoch) == plans[0].count(0)
        assert sorted(sum(first, [])) == list(range(200))
    assert [p.tolist() for p in plans[0].entries(0)] != [p.tolist() for p in plans[0].entries(1)]


def test_figures_say_what_packing_saves():
    """8 rows of 4 and 8 of 60 tokens fill 8 packs of 64; as one batch of rows 512 of 960 positions
    are tokens."""
    plan = EpochOrder(np.array([4, 60] * 8), pack_length=64)
    figures = plan.packing_figures(batch_size=16)
    assert figures["packing/rows_per_pack"] == 2.0 and figures["packing/padding"] == 0.0
    assert figures["packing/padding_unpacked"] == pytest.approx(1 - 512 / (16 * 60))
    assert "16 rows in 8 packs of up to 64 tokens, 2.0 rows a pack" in plan.describe_packing(16)
    assert EpochOrder(np.array([4, 60])).packing_figures(2) == {}
